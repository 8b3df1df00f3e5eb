"""Checks of a server, its records and its topology."""
