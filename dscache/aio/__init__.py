"""Connections and clusters on an asyncio event loop."""
