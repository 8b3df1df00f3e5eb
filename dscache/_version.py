"""The version: the build and the releases read it from here."""

__version__ = "0.1.0"
