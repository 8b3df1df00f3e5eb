"""Connections and subscriptions of message nodes."""
