"""The name by which pickles of dscache 0.1 know the class of messages."""

from ._backend import make_message

Message = make_message

__all__ = ["Message"]
