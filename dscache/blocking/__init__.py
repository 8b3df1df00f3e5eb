"""Connections and clusters for threads."""
