"""The name by which pickles of dscache 0.1 know the class of records."""

from ._backend import make_record

Record = make_record

__all__ = ["Record"]
