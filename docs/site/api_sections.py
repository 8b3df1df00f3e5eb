"""Sections of the API pages: Parameters, Returns and Raises, made of signatures and docstrings.

A docstring of the package says in sentences what a call returns and raises, so that it can be
read in a terminal. This extension of griffe moves these sentences into sections, and adds the
parameters.
"""

from __future__ import annotations

import builtins
import inspect
import re
from typing import Any

import griffe

from dscache import errors

PARAMETERS = {
    "name": "The name of the record: any text that isn't empty.",
    "names": "The names of the records. A name that occurs twice counts once.",
    "version": "The version to write: an integer from 0 to 2^63-1.",
    "data": "Any value that msgspec encodes, a model of pydantic, or `msgspec.Raw` with JSON text.",
    "records": "A mapping of name to `(version, data)`.",
    "ttl": "The lifetime in whole seconds, or a `timedelta`: `None` for the configured default, 0 "
    "for no expiry.",
    "if_newer": "Write only if Redis holds a lower version or no record.",
    "if_version": "Write only if Redis holds this version; `None` stands for no record.",
    "type": "The type of the record's data. Without it, data is made of dicts, lists and the like.",
    "change": "A function from the data to the new data. `KEEP` leaves the record, `DELETE` "
    "removes it.",
    "default": "The data of a record that doesn't exist yet. Without it: `RecordMissing`.",
    "merge": "A JSON merge patch (RFC 7396).",
    "path": "The path of one value, such as `a.b[0]`, in place of `merge`.",
    "value": "The value to put there. Without it, the value there is removed.",
    "load": "A function from the name to the data, called if the record is missing.",
    "load_many": "A function from a list of missing names to a mapping of name to data.",
    "refresh_after": "Seconds after which one caller loads the record anew. Less than `ttl`.",
    "jitter": "The share of `ttl` by which lifetimes differ: at least 0, and less than 1.",
    "keep_missing": "Seconds for which it is remembered that there was nothing to load.",
    "prefix": "The beginning of the names. Without it, all records of the database.",
    "count": "About how many keys a server visits at a time, by default 1,000.",
    "cursor": "The `cursor` of an earlier scan, which goes on behind its last batch.",
    "max_pending": "The number of messages that may wait to be taken, by default `maxPending`.",
    "source": "A file, a URL, `host:port` or a mapping of options.",
    "url": "A URL or `host:port`.",
    "credentials": "A `redis.CredentialProvider`, in place of the configured login.",
    "options": "Options that override those of the source, in snake_case or as in a file.",
    "topic": "The topic of the message: an integer from 0 to 2147483647.",
    "message": "Any value that msgspec encodes, with a `topic`; or `msgspec.Raw` with JSON text.",
    "unchecked": "Send it even if deepstream's servers or clients could fail on it.",
    "server": "The name of the server that gets the message.",
    "callback": "A function or coroutine function of the message and the sender's name.",
    "overflow": "The fate of further messages, as the option `overflow` says.",
    "server_name": "The unique name of this server; overrides the configured one.",
    "on_gap": "A function called after a gap in which messages may have been missed.",
}
"""The parameters of ``COMPLETE``. ``OTHERS`` has the few that mean something else in one method."""
COMPLETE = (
    "dscache.cache.AsyncCache",
    "dscache.sync.Cache",
    "dscache._cache.CacheBase",
    "dscache.messages.MessageNode",
)
"""Classes of which every parameter has a description."""
_TYPE = "A `msgspec.Struct`, dataclass or other type that msgspec decodes."
_PATTERN = "The names: `*` stands for any text, `?` for one character."
_CACHE = "An `AsyncCache` or a `Cache`."
_LABEL = "The name of the cache in its metrics, as the label `cache`."
_METERS = "The provider of the metrics. Without it, the global one."
_SERIALIZED = {"value": "The value to store.", "data": "The decoded JSON of a record."}
OTHERS = {
    "dscache.core.record.Record": {"type": _TYPE},
    "dscache.core.message.Message": {
        "type": _TYPE,
        "key": "The name of a member.",
        "default": "The result if there is no such member.",
    },
    "dscache._backend.make_record": {
        "name": PARAMETERS["name"],
        "version": "An integer from 0 to 2^63-1.",
        "raw": "The data as JSON text.",
        "stale": "Whether the record was read while Redis was away.",
        "type": PARAMETERS["type"],
    },
    "dscache._backend.make_message": {
        "topic": "The topic on which it came.",
        "sender": "The name of the server that sent it.",
        "raw": "The message as JSON text.",
    },
    "dscache.config.loader.load": {
        "source": PARAMETERS["source"],
        "environ": "The variables for `${NAME}`. Without it, those of the process.",
        "options": PARAMETERS["options"],
    },
    "dscache.deepstream.peer.Peer": {
        "source": PARAMETERS["source"],
        "server_name": "The unique name of this peer. Without it, a random name is made.",
        "credentials": PARAMETERS["credentials"],
        "on_gap": PARAMETERS["on_gap"],
        "reconcile": "Have the servers read a record again after messages about it crossed.",
        "options": PARAMETERS["options"],
    },
    "dscache.deepstream.events.Events": {
        "name": "The name of the event: any text that isn't empty.",
        "data": "Any value that msgspec encodes.",
        "pattern": _PATTERN,
        "max_pending": "The number of events that may wait to be taken, by default `maxPending`.",
        "overflow": "The fate of further events: `drop_oldest`, `drop_newest` or `disconnect`.",
    },
    "dscache.deepstream.records.Records": {
        "name": PARAMETERS["name"],
        "names": "The name of a record, or several.",
        "data": "An object or an array: any such value that msgspec encodes.",
        "change": PARAMETERS["change"],
        "path": "The path of the value, such as `address.street` or `a.b[0]`.",
        "value": PARAMETERS["value"],
        "default": PARAMETERS["default"],
        "ttl": PARAMETERS["ttl"],
        "pattern": _PATTERN,
        "max_pending": "The number of changes that may wait to be taken, by default 10,000.",
    },
    "dscache.deepstream.lists.Lists": {
        "name": "The name of the list, which is that of its record.",
        "entry": "The text to add or remove.",
        "entries": "The new entries, a list of texts.",
        "index": "The place of the new entry, from 0. Without it, the end.",
        "unique": "Whether an entry that is there already isn't added again.",
    },
    "dscache.deepstream.rpc.RPCs": {
        "name": "The name of the RPC: any text that isn't empty.",
        "handler": "A function or coroutine function from the caller's data to the result.",
        "max_running": "The number of requests that an async handler serves at a time.",
        "data": "Any value that msgspec encodes.",
        "timeout": "Seconds for the whole call. Without it, `rpc.responseTimeout`.",
    },
    "dscache.deepstream.presence.Presence": {
        "user": "The name by which the user is logged in.",
    },
    "dscache.pubsub.protocol.check": {
        "message": "A mapping, a Struct, a dataclass, or `msgspec.Raw` with JSON text.",
        "topic": "The channel of the message. Without it, the topic that the message states.",
    },
    "dscache.prometheus.register": {
        "cache": _CACHE,
        "name": _LABEL,
        "registry": "A registry of `prometheus_client`. Without it, the global one.",
    },
    "dscache.prometheus.CacheCollector": {"cache": _CACHE, "name": _LABEL},
    "dscache.otel.observe": {
        "cache": _CACHE,
        "name": "The name of the cache, as the attribute `dscache.cache`.",
        "meter_provider": _METERS,
    },
    "dscache.otel.measure": {
        "cache": _CACHE,
        "name": "The name of the cache, as the attribute `dscache.cache`.",
        "meter_provider": _METERS,
    },
    "dscache.otel.trace": {
        "cache": _CACHE,
        "sample": "The share of the operations that get a span, from 0 to 1.",
        "roots": "Whether operations outside of any trace get spans too.",
        "tracer_provider": "The provider of the spans. Without it, the global one.",
    },
    "dscache.django.RecordCache": {
        "key": "The key, without Django's prefix and version.",
        "keys": "The keys, without Django's prefix and version.",
        "value": "Any value that the serializer takes.",
        "data": "A mapping of key to value.",
        "default": "The result if there is no value.",
        "timeout": "Seconds that the value lives: `None` for ever, 0 or less not at all. "
        "Without it, `TIMEOUT` of the settings.",
        "version": "Django's version of the key. Without it, `VERSION` of the settings.",
        "delta": "The number to add.",
    },
    "dscache.django.Serializer": _SERIALIZED,
    "dscache.django.JSONSerializer": _SERIALIZED,
    "dscache.django.PickleSerializer": _SERIALIZED,
    "dscache.key_value.RecordStore": {
        "key": "The key of a value.",
        "keys": "The keys of values.",
        "value": "A mapping that has a JSON text.",
        "values": "As many mappings, each of which has a JSON text.",
        "collection": "The name of a collection. Without it, the store's `default_collection`.",
        "ttl": "Seconds that the value lives. Without it, the value doesn't expire.",
        "limit": "The number of results at most. Without it, all.",
    },
    "dscache.key_value.RecordStore.destroy_collection": {
        "collection": "The name of the collection.",
    },
}
"""The parameters of other functions, by the path of the function or its class."""
for _owner in COMPLETE[:2]:
    OTHERS |= {
        f"{_owner}.delete": {"if_version": "Remove only if Redis holds this version."},
        f"{_owner}.set_bulk": {
            "if_version": "A mapping of name to the version that Redis must hold, or to `None` for "
            "no record.",
        },
        f"{_owner}.delete_bulk": {
            "if_version": "A mapping of name to the version that Redis must hold."
        },
        f"{_owner}.scan": {"records": "Whether to return Records in place of names."},
        f"{_owner}.watch": {
            "records": "Whether to read the records too.",
            "max_pending": "The number of names that may wait to be taken, by default 100,000.",
        },
    }

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
        known = known_parameters(func.path)
        unknown = [name for name in names if name not in known]
        if unknown and known:
            raise ValueError(f"{func.path}: docs/site/api_sections.py lacks {', '.join(unknown)}")
        described = {name: known[name] for name in names if name in known}
        func.docstring.value = with_sections(func.docstring.value, described)


def known_parameters(path: str) -> dict[str, str]:
    """Return the descriptions of the parameters that a function may have; empty without any."""
    owner = path.rpartition(".")[0]
    known = dict(PARAMETERS) if owner in COMPLETE else {}
    return known | OTHERS.get(owner, {}) | OTHERS.get(path, {})


def with_sections(text: str, parameters: dict[str, str]) -> str:
    """Return a docstring whose sentences on results and errors are sections in Google's style."""
    returned = ""
    raised: list[tuple[str, str]] = []
    paragraphs = []
    for paragraph in text.split("\n\n"):
        if paragraph.lstrip().startswith("- "):
            paragraphs.append(inspect.cleandoc(paragraph))
            continue
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
            returned = f"a mapping of {said}" if " maps " in found[0][:20] else said
            paragraphs[0] = " ".join([f"{first[: found.start()]}.", *others])
        elif first.startswith(("Return ", "Returns ")):
            returned = first.rstrip(".").partition(" ")[2]
    if parameters:
        paragraphs.append(_section("Args", parameters.items()))
    if returned:
        # A colon would end the name of a type.
        paragraphs.append(f"Returns:\n    {_line(returned).replace(': ', ', ')}")
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
