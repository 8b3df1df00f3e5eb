"""All that a program can see of an error, and the forms in which a text may show a password."""

from __future__ import annotations

import json
import pickle
import re
import traceback
from pathlib import Path
from urllib.parse import quote

from dscache.errors import BulkError

_TESTS = str(Path(__file__).parents[1])
# A prefix of so many characters gives a password away.
_PREFIX = 6


def content_of(error: BaseException | None, *, with_locals: bool = True) -> str:
    """Return the content of an error: texts, arguments, notes, pickle, and frames with locals.

    Errors reachable from it are included. Frames of the tests, which have every password, are not.
    Without ``with_locals``, the frames are shown without the arguments of the caller.
    """
    told = []
    seen: set[int] = set()
    errors = [error]
    while errors:
        one = errors.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        told += [str(one), repr(one), repr(one.args), repr(vars(one))]
        told += getattr(one, "__notes__", [])
        told.append(pickle.dumps(one, 0).decode(errors="replace"))
        shown = traceback.TracebackException.from_exception(one, capture_locals=with_locals)
        shown.stack = traceback.StackSummary.from_list(
            [frame for frame in shown.stack if not frame.filename.startswith(_TESTS)]
        )
        told += list(shown.format(chain=False))
        errors += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            errors += one.exceptions
        if isinstance(one, BulkError):
            errors += one.errors.values()
    return "\n".join(told)


def as_redis_quotes(text: str) -> str:
    """Return a text as Redis escapes it in its log and in MONITOR."""
    named = {0x22: '\\"', 0x5C: "\\\\", 0x0A: "\\n", 0x0D: "\\r", 0x09: "\\t"}
    return "".join(
        named.get(byte) or (chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}")
        for byte in text.encode()
    )


def forms_of(secret: str) -> set[str]:
    """Return the forms in which a text may show a password, or its beginning."""
    forms = set()
    for part in (secret, secret[:_PREFIX]):
        forms |= {part, repr(part)[1:-1], repr(part.encode())[2:-1], as_redis_quotes(part)}
        forms |= {json.dumps(part)[1:-1], quote(part), quote(part, safe="")}
        forms.add(part.replace("\n", " "))
    return forms


def shown_secrets(text: str, secret: str) -> list[str]:
    """Return the parts of a text that show a password; it may be a word of other texts."""
    return [
        found[0]
        for form in forms_of(secret)
        for found in re.finditer(rf".{{,60}}(?<!\w){re.escape(form)}.{{,20}}", text)
        if len(form) >= _PREFIX or re.search(rf"(?<!\w){re.escape(form)}(?!\w)", found[0])
    ]
