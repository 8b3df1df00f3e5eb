"""Sections of the API pages: Parameters, Returns and Raises, made of signatures and docstrings.

A docstring of the package says in sentences what a call returns and raises, so that it can be
read in a terminal. This extension of griffe moves these sentences into sections, and adds the
parameters.
"""

from __future__ import annotations

import builtins
import re
from typing import Any

import griffe

from dscache import errors

PARAMETERS = {
    "name": "The name of the record: any text that isn't empty.",
    "names": "The names of the records; a name that occurs twice is read once.",
    "version": "The version to write: an integer from 0 to 2^63-1.",
    "data": "Any value that msgspec encodes, a model of pydantic, or `msgspec.Raw` with JSON text.",
    "records": "For `set_bulk`, a mapping of name to `(version, data)`. For `scan` and `watch`, "
    "whether to read the records too.",
    "ttl": "Seconds that the record lives: `None` for the configured default, 0 for no expiry.",
    "if_newer": "Write only if Redis holds a lower version or no record.",
    "if_version": "Write only if Redis holds this version, or no record if it is `None`. A bulk "
    "takes a mapping of name to version.",
    "type": "The type of the record's data. Without it, data is made of dicts, lists and the like.",
    "change": "A function from the data to the new data. `KEEP` leaves the record, `DELETE` "
    "removes it.",
    "default": "The data of a record that doesn't exist yet. Without it: `RecordMissing`.",
    "merge": "A JSON merge patch (RFC 7396).",
    "path": "The path of one value, such as `a.b[0]`, in place of `merge`.",
    "value": "The value to put there; without it, the value there is removed.",
    "load": "A function from the name to the data, called if the record is missing.",
    "load_many": "A function from a list of missing names to a mapping of name to data.",
    "refresh_after": "Seconds after which one caller loads the record anew.",
    "jitter": "The part of `ttl` by which lifetimes differ, from 0 to 1.",
    "keep_missing": "Seconds for which it is remembered that there was nothing to load.",
    "prefix": "The beginning of the names. Without it, all records of the database.",
    "count": "About how many keys a server visits at a time.",
    "cursor": "The `cursor` of an earlier scan, which goes on behind its last batch.",
    "max_pending": "The number of items that may wait to be taken.",
    "source": "A file, a URL, `host:port` or a mapping of options.",
    "url": "The URL of the server.",
    "credentials": "A `redis.CredentialProvider`, in place of the configured login.",
    "options": "Options that override those of the source, in snake_case or as in a file.",
    "topic": "The topic of the message: a whole number, or a name among deepstream's topics.",
    "message": "Any value that msgspec encodes, with a `topic`; or `msgspec.Raw` with JSON text.",
    "unchecked": "Send it even if deepstream's servers or clients could fail on it.",
    "server": "The name of the server that gets the message.",
    "callback": "A function or coroutine function of the message and the sender's name.",
    "overflow": "The fate of further messages, as the option `overflow` says.",
    "server_name": "The unique name of this server; overrides the configured one.",
    "on_gap": "A function called after a gap in which messages may have been missed.",
}
"""Parameters mean the same wherever they occur, so that each is described once."""
COMPLETE = ("dscache.cache.AsyncCache", "dscache.sync.Cache", "dscache.messages.MessageNode")
"""Classes of which every parameter has a description."""

_SENTENCE = re.compile(r"(?<=\.)\s+(?=[A-Z`])")
_RAISED = re.compile(r"(Raises|The future fails with) ")
_RETURNED = re.compile(r"[;,] (?:and )?(?:the result is|the result maps|return) (.+)\.$")
_ERRORS = {
    name
    for module in (errors, builtins)
    for name, value in vars(module).items()
    if isinstance(value, type) and issubclass(value, BaseException)
}
_NEXT = re.compile(rf"(?:^|[;,] (?:and |or )?| and | or )(?=(?:{'|'.join(sorted(_ERRORS))})\b)")


class Sections(griffe.Extension):
    """Adds the sections to the docstrings of public functions."""

    def on_function(self, *, func: griffe.Function, **others: Any) -> None:
        if func.docstring is None or func.name.startswith("_"):
            return
        names = [one.name for one in func.parameters if one.name not in ("self", "cls")]
        owner = func.parent.path if func.parent is not None else ""
        unknown = [name for name in names if name not in PARAMETERS]
        if unknown and owner in COMPLETE:
            raise ValueError(f"{func.path}: docs/site/api_sections.py lacks {', '.join(unknown)}")
        described = {} if unknown else {name: PARAMETERS[name] for name in names}
        func.docstring.value = with_sections(func.docstring.value, described)


def with_sections(text: str, parameters: dict[str, str]) -> str:
    """Return a docstring whose sentences on results and errors are sections in Google's style."""
    returned = ""
    raised: list[tuple[str, str]] = []
    paragraphs = []
    for paragraph in text.split("\n\n"):
        kept = []
        for sentence in _SENTENCE.split(" ".join(paragraph.split())):
            rest, errors = _raised(sentence)
            kept += [rest] if rest else []
            raised += errors
        if kept:
            paragraphs.append(" ".join(kept))
    if paragraphs:
        first, *others = _SENTENCE.split(paragraphs[0])
        if found := _RETURNED.search(first):
            said = found[1]
            returned = f"a mapping: {said}" if " maps " in found[0][:20] else said
            paragraphs[0] = " ".join([f"{first[: found.start()]}.", *others])
        elif first.startswith(("Return ", "Returns ")):
            returned = first.rstrip(".").partition(" ")[2]
    if parameters:
        paragraphs.append(_section("Args", parameters.items()))
    if returned:
        # A colon would end the name of a type.
        paragraphs.append(f"Returns:\n    {_line(returned).replace(':', ',')}")
    if raised:
        paragraphs.append(_section("Raises", raised))
    return "\n\n".join(paragraphs)


def _raised(sentence: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the part of a sentence that names no error, and its errors, each with its reason."""
    found = _RAISED.match(sentence)
    if found is None:
        return sentence, []
    first, *parts = _NEXT.split(sentence[found.end() :].rstrip("."))
    awaited = found[1] != "Raises"
    errors: list[tuple[str, str]] = []
    waiting: list[str] = []
    for part in parts:
        name, _, reason = part.partition(" ")
        waiting.append(name.rstrip(","))
        if reason:
            when = "when awaited, " if awaited and reason.startswith("if ") else ""
            errors += [(one, _line(f"{when}{reason}")) for one in waiting]
            waiting = []
    if waiting:
        return sentence, []
    return f"{found[0]}{first}." if first else "", errors


def _section(title: str, entries: Any) -> str:
    return "\n".join([f"{title}:", *(f"    {name}: {text}" for name, text in entries)])


def _line(text: str) -> str:
    """Return a text as one line that begins with a capital and ends with a full stop."""
    line = " ".join(text.split())
    return f"{line[:1].upper()}{line[1:]}."
