"""The types of records, messages and errors. Type checkers read this file; nothing runs it."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView
from dataclasses import dataclass
from typing import Any, assert_type

import dscache
from dscache import BulkError, Message, Record, RecordError, ReplyError


@dataclass
class User:
    firstname: str


def of_a_record(record: Record) -> None:
    assert_type(record.name, str)
    assert_type(record.version, int)
    assert_type(record.raw, bytes)
    assert_type(record.stale, bool)
    assert_type(record.data, Any)
    assert_type(record.decode(User), User)
    assert_type(record.decode(list[User]), list[User])
    version, data = record
    assert_type(version, int)
    assert_type(data, Any)
    print({record: 1})


def of_a_typed_record(record: Record[User], untyped: Record) -> None:
    assert_type(record.data, User)
    assert_type(record.raw, bytes)
    version, user = record
    assert_type(version, int)
    assert_type(user, User)
    assert_type(record.decode(dict[str, str]), dict[str, str])
    anything: Record[object] = record
    nothing_known: Record = record
    user_after_all: Record[User] = untyped
    print(anything, nothing_known, user_after_all)


def made() -> None:
    assert_type(Record("n", 1, b"{}"), Record)
    assert_type(Record("n", 1, b"{}", type=User), Record[User])
    assert_type(dscache.make_record("n", 1, b"{}", type=User), Record[User])


def of_a_message(message: Message) -> None:
    assert_type(message.topic, int)
    assert_type(message.sender, str)
    assert_type(message.raw, bytes)
    assert_type(message.data, Any)
    assert_type(message.keys(), KeysView[str])
    assert_type(message.items(), ItemsView[str, Any])
    assert_type(iter(message), Iterator[Any])
    assert_type(message["topic"], Any)
    assert_type("topic" in message, bool)
    assert_type(len(message), int)
    assert_type(message.decode(User), User)


def of_errors() -> None:
    try:
        pass
    except RecordError as error:
        assert_type(error.name, object)
    except BulkError as error:
        assert_type(error.errors, dict[str, Exception])
    except ReplyError as error:
        assert_type(error.code, str)
        assert_type(error.message, str)
    except dscache.DscacheError as error:
        print(error)


def are_also(
    usage: dscache.UsageError,
    record: dscache.RecordError,
    refused: dscache.ConnectError,
    lost: dscache.ConnectionLost,
    late: dscache.DeadlineExceeded,
) -> tuple[RuntimeError, ValueError, ConnectionError, ConnectionError, TimeoutError]:
    return usage, record, refused, lost, late


def of_the_package() -> None:
    assert_type(dscache.BACKEND, str)
    assert_type(dscache.__version__, str)
    assert_type(dscache.make_record("n", 1, b"{}"), Record)
    assert_type(dscache.make_message(1, "server", b"{}"), Message)
    dscache.no_such_name  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue] # noqa: B018
