"""No output contains a password, whatever a server replies: errors, frames, log, stats, commands.

Servers repeat the arguments of an unknown command, and a hostile one repeats anything.
"""

from __future__ import annotations

import asyncio
import html
import json
import logging
from base64 import b64encode, urlsafe_b64encode
from binascii import hexlify
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from redis.credentials import CredentialProvider

import dscache
from dscache.embedded import EmbeddedServer
from dscache.errors import DscacheError, ReplyError, clean
from dscache.net.credentials import Hidden, masked
from tests.conftest import SERVERS, _server_id
from tests.support.commands import invoke
from tests.support.faults import HELLO_REPLY, FakeServer
from tests.support.outputs import as_redis_quotes, content_of
from tests.support.waiting import until

SECRET = "hunter2-of-the-app"
OTHER = "hunter2-of-the-watch"
SECRETS = (SECRET, OTHER)
MakeServer = Callable[..., EmbeddedServer]

# Each is a server's reaction to commands that it was not meant to get.
RENAMED = {
    "both": ("--rename-command", "HELLO", "", "--rename-command", "AUTH", ""),
    "AUTH": ("--rename-command", "AUTH", ""),
    "HELLO": ("--rename-command", "HELLO", "", "--requirepass", "another"),
}


def assert_hidden(text: str) -> None:
    assert text
    for secret in SECRETS:
        for part in (secret, secret[:10], repr(secret)[1:-1]):
            assert part not in text, text


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.DEBUG)
    yield
    for record in caplog.get_records("call"):
        shown = record.getMessage()
        if record.exc_info:
            shown += content_of(record.exc_info[1])
        assert_hidden(f"{record.name}: {shown}")


def config_of(port: int, **more: Any) -> dict[str, Any]:
    options = {
        **{"host": "127.0.0.1", "port": port, "username": "app", "password": SECRET},
        **{"commandTimeout": 3000, "connectTimeout": 3000, "retryStrategy": {"first": 1, "cap": 5}},
        **more,
    }
    return {"name": "redis", "options": options}


async def fail_everywhere(config: dict[str, Any], **more: Any) -> str:
    """Return the texts of all errors and counters for a server that no cache can use."""
    told = []
    cache = dscache.AsyncCache.from_config(config, **more)
    for ask in (cache.when_ready, lambda: cache.get("a"), lambda: cache.set("a", 1, {"b": SECRET})):
        try:
            await ask()
        except DscacheError as error:
            told.append(content_of(error))
        else:
            raise AssertionError("the server was of use")
    told.append(repr(cache.stats()) + cache.description)
    await cache.close()

    def block() -> None:
        blocking = dscache.Cache.from_config(config, **more)
        for ask in (blocking.when_ready, lambda: blocking.get("a")):
            try:
                ask()
            except DscacheError as error:
                told.append(content_of(error))
            else:
                raise AssertionError("the server was of use")
        told.append(repr(blocking.stats()) + blocking.description)
        blocking.close()

    await asyncio.to_thread(block)
    return "\n".join(told)


@pytest.mark.parametrize("server", SERVERS, indirect=True, ids=_server_id)
@pytest.mark.parametrize("renamed", RENAMED)
async def test_a_server_with_renamed_commands(
    make_server: MakeServer, renamed: str, backend: str
) -> None:
    started = make_server(*RENAMED[renamed])
    # Redis repeats the unknown command; that is the point.
    told = await fail_everywhere(config_of(started.port))
    assert_hidden(told)
    url = f"redis://app:{SECRET}@127.0.0.1:{started.port}"
    for words in (("doctor", "--url", url), ("get", "a", "--url", url)):
        done = await asyncio.to_thread(invoke, *words)
        assert_hidden(done.out + done.err + "shown")


def repeated(command: list[bytes]) -> bytes:
    return b"-ERR what is " + b" ".join(command).replace(b"\r\n", b" ") + b"?\r\n"


def in_its_name(command: list[bytes]) -> bytes:
    text = b" ".join(command)
    return b"%%1\r\n$6\r\nserver\r\n$%d\r\n%b\r\n" % (len(text), text)


def as_a_push(command: list[bytes]) -> bytes:
    return b">2\r\n$0\r\n\r\n$%d\r\n%b\r\n" % (len(command[-1]), command[-1])


def cut_in_the_middle(command: list[bytes]) -> bytes:
    return b"-ERR " + b"x" * (470 - 5) + command[-1] + b"y" * 10_000 + b"\r\n"


HOSTILE = {
    "error": {"HELLO": repeated, "AUTH": repeated},
    "code": dict.fromkeys(("HELLO", "AUTH"), lambda command: b"-" + command[-1] + b"\r\n"),
    "old": {"HELLO": b"-ERR unknown command\r\n", "AUTH": repeated},
    "push": {"HELLO": as_a_push},
    "cut": {"HELLO": cut_in_the_middle, "AUTH": cut_in_the_middle},
    "select": {"SELECT": lambda command: b"-ERR no: " + SECRET.encode() + b"\r\n"},
}


@pytest.mark.parametrize("way", HOSTILE)
async def test_a_server_that_repeats_its_commands(way: str, backend: str) -> None:
    async with FakeServer(HOSTILE[way]) as fake:  # type: ignore[arg-type]
        assert_hidden(await fail_everywhere(config_of(fake.port, db=1)))
        assert any(SECRET.encode() in word for said in fake.commands for word in said)


async def test_a_server_named_like_the_password(backend: str) -> None:
    async with FakeServer({"HELLO": in_its_name}) as fake:
        config = config_of(fake.port)
        async with dscache.AsyncCache.from_config(config) as cache:
            assert_hidden(cache.description + repr(cache.stats()))
            assert "***" in cache.description

        def block() -> str:
            with dscache.Cache.from_config(config) as blocking:
                blocking.when_ready()
                return blocking.description + repr(blocking.stats())

        assert_hidden(await asyncio.to_thread(block))


async def test_a_sentinel_that_repeats_its_commands(backend: str) -> None:
    answers = {"AUTH": repeated, "HELLO": repeated, "SENTINEL": repeated}
    async with FakeServer(answers) as fake:  # type: ignore[arg-type]
        config = {
            "name": "redis",
            "options": {
                "sentinels": [{"host": "127.0.0.1", "port": fake.port}],
                "name": "group",
                "password": SECRET,
                "sentinelUsername": "watch",
                "sentinelPassword": OTHER,
                "commandTimeout": 1000,
                "connectTimeout": 1000,
                "retryStrategy": {"first": 1, "cap": 5},
            },
        }
        assert_hidden(await fail_everywhere(config))
        assert any(OTHER.encode() in word for said in fake.commands for word in said)


class Provider(CredentialProvider):
    """Returns a token, or fails with it in the error text."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def get_credentials(self) -> tuple[str, str]:
        if self.fails:
            raise ValueError(f"the token {SECRET} is too old")
        return "app", SECRET


@pytest.mark.parametrize("fails", [False, True])
async def test_the_token_of_a_provider_is_hidden(fails: bool, backend: str) -> None:
    async with FakeServer({"HELLO": repeated, "AUTH": repeated}) as fake:
        config = config_of(fake.port, commandTimeout=500, connectTimeout=500)
        del config["options"]["username"], config["options"]["password"]
        assert_hidden(await fail_everywhere(config, credentials=Provider(fails)))


@pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id)
async def test_records_are_not_repeated_either(make_server: MakeServer, backend: str) -> None:
    """The script for guarded writes has a record's data as its arguments."""
    started = make_server("--rename-command", "EVALSHA", "", "--rename-command", "EVAL", "")
    async with dscache.AsyncCache.from_config(started.url) as cache:
        with pytest.raises(ReplyError) as caught:
            await cache.set("a", 1, {"token": SECRET}, if_newer=True)
        assert caught.value.code == "ERR"
        assert "unknown command" in str(caught.value)
        told = content_of(caught.value)
        assert_hidden("\n".join(line for line in told.splitlines() if "data = " not in line))


async def test_a_timeout_of_the_handshake(backend: str) -> None:
    async with FakeServer({"HELLO": b""}) as fake:
        config = config_of(fake.port, commandTimeout=300, connectTimeout=200)
        assert_hidden(await fail_everywhere(config))


class Renewing(CredentialProvider):
    """Returns a token, and publishes another."""

    def __init__(self) -> None:
        self.told: Callable[[Any], Any] | None = None

    def get_credentials(self) -> tuple[str, str]:
        return "app", SECRET

    def on_next(self, told: Callable[[Any], Any]) -> None:
        self.told = told

    def try_get(self, claim: str) -> str:
        return "app"

    def get_value(self) -> str:
        return OTHER


async def test_renewed_credentials_that_are_refused(
    backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    provider = Renewing()
    async with FakeServer({"HELLO": HELLO_REPLY, "AUTH": repeated}) as fake:
        config = config_of(fake.port)
        async with dscache.AsyncCache.from_config(config, credentials=provider) as cache:
            assert provider.told is not None
            provider.told(provider)
            await until(lambda: "AUTH was refused" in caplog.text)
            assert_hidden(repr(cache.stats()))
        assert any(OTHER.encode() in word for said in fake.commands for word in said)


async def test_the_token_before_the_renewed_one_is_hidden_too(
    backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    provider = Renewing()
    former = b"-ERR you were " + SECRET.encode() + b"\r\n"
    async with FakeServer({"HELLO": HELLO_REPLY, "AUTH": former}) as fake:
        config = config_of(fake.port)
        del config["options"]["username"], config["options"]["password"]
        async with dscache.AsyncCache.from_config(config, credentials=provider) as cache:
            assert provider.told is not None
            provider.told(provider)
            await until(lambda: "AUTH was refused: ERR you were ***" in caplog.text)
            assert_hidden(repr(cache.stats()))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ERR no such pa55", "ERR no such ***"),
        ("pa55", "***"),
        ("WRONGPASS pa55pa55", "WRONGPASS ******"),
        ("ERR x pa… (9000 characters)", "ERR x ***… (9000 characters)"),
        ("ERR x p… (9000 characters)", "ERR x ***… (9000 characters)"),
        ("ERR x… (9000 characters)", "ERR x… (9000 characters)"),
        ("ERR no PA55 or Pa55", "ERR no *** or ***"),
    ],
)
def test_masked_texts_hide_secrets(text: str, shown: str) -> None:
    assert masked(text, [None, Hidden(""), Hidden("pa55")]) == shown


FORMS: dict[str, Callable[[str], str]] = {
    "itself": str,
    "Redis": as_redis_quotes,
    "repr": lambda text: repr(text)[1:-1],
    "bytes": lambda text: repr(text.encode())[2:-1],
    "JSON": lambda text: json.dumps(text)[1:-1],
    "octal": lambda text: "".join(f"\\{byte:03o}" for byte in text.encode()),
    "URL": quote,
    "part of a URL": partial(quote, safe=""),
    "URL in lower case": lambda text: "".join(f"%{byte:02x}" for byte in text.encode()),
    "form of HTML": quote_plus,
    "HTML": html.escape,
    "XML": lambda text: text.encode("ascii", "xmlcharrefreplace").decode(),
    "one line": lambda text: " ".join(text.splitlines()),
    "SQL": lambda text: text.replace("'", "''"),
    "Latin-1": lambda text: text.encode().decode("latin-1"),
    "ASCII": lambda text: text.encode().decode("ascii", "replace"),
    "question marks": lambda text: text.encode("ascii", "replace").decode(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "secret", ["p@ss/w:rd 'ü", 'a"b\\c`d', "two\nlines", "日本-😀-€", "c\x07\x01\x7f-d"]
)
def test_masked_texts_hide_each_form_of_a_secret(form: str, secret: str) -> None:
    text = clean(f"ERR no {FORMS[form](secret)}!")
    assert masked(text, [Hidden("p@ss"), Hidden(secret)]) == "ERR no ***!"


@pytest.mark.parametrize("encode", [b64encode, urlsafe_b64encode, hexlify])
@pytest.mark.parametrize("user", ["", "a", "ap", "app"])
@pytest.mark.parametrize("secret", ["p@ss", "p?>ss~w:rd", "hunter2-of-the-app", "日本-😀-€"])
def test_masked_texts_hide_an_encoded_login(
    encode: Callable[[bytes], bytes], user: str, secret: str
) -> None:
    encoded = encode(f"{user}:{secret}".encode()).decode()
    shown = masked(f"ERR bad header {encoded}", [Hidden(secret)])
    # No more of it is left than the name, and the characters of two groups' ends.
    ours, _, rest = shown.removeprefix("ERR bad header ").partition("***")
    assert encoded.startswith(ours)
    assert encoded.endswith(rest)
    assert len(ours) <= 2 * len(user) + 4
    assert len(rest) <= 3


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ERR no token-of-128-char's here", "ERR no *** here"),
        ("ERR no 'token' 'x'", "ERR no '***' 'x'"),
        ('ERR no "token-…"', 'ERR no "***…"'),
        ("ERR no token-...", "ERR no ***..."),
        ("ERR no token", "ERR no ***"),
        ("ERR no tokens here", "ERR no tokens here"),
        ("ERR no to", "ERR no to"),
    ],
)
def test_masked_texts_hide_a_secret_that_was_cut(text: str, shown: str) -> None:
    assert masked(text, [Hidden("token-of-128-char's-" + "x" * 2000)]) == shown


@pytest.mark.parametrize(
    ("secret", "text", "shown"),
    [
        ("ab", "ERR no ab or 'ab'", "ERR no *** or '***'"),
        ("ab", "ERR unable to label", "ERR unable to label"),
        ("p", "ERR redis://app:p@host", "ERR redis://app:***@host"),
        ("valid", "WRONGPASS invalid username-password pair or user is disabled.", None),
        ("password", "ERR invalid password", None),
        ("password", "ERR wrong password", "ERR wrong ***"),
        ("ERR", "ERR no ERR", "ERR no ***"),
    ],
)
def test_masks_give_no_word_away(secret: str, text: str, shown: str | None) -> None:
    assert masked(text, [Hidden(secret)]) == (shown or text)


REPEATED = {
    "ERR unknown command `AUTH`, with args beginning with: `{}`, ": "ERR unknown command `AUTH`",
    "ERR unknown command 'AUTH', with args beginning with: 'a' '{}' ": "ERR unknown command 'AUTH'",
    "ERR Unknown command 'AUTH' with args beginning with '{}'": "ERR Unknown command 'AUTH'",
    "ERR unknown command 'AUTH', args starting with {}": "ERR unknown command 'AUTH'",
    "ERR unknown command 'AUTH app {}'": "ERR unknown command 'AUTH'",
    "ERR unknown command AUTH app {}": "ERR unknown command AUTH",
    "ERR unknow command: 'auth' '{}'": "ERR unknow command: 'auth'",
    "ERR Unknown or disabled command 'AUTH' {}": "ERR Unknown or disabled command 'AUTH'",
    'unsupported command "HELLO" [{}]': 'unsupported command "HELLO"',
    "ERR command 'AUTH' is not supported, args=[{}]": "ERR command 'AUTH' is not supported, args",
    "ERR invalid arguments: {}": "ERR invalid arguments",
    "ERR unknown command '', with args beginning with: {}": "ERR unknown command ''",
}


@pytest.mark.parametrize("text", REPEATED)
def test_repeated_arguments_are_cut_off(text: str) -> None:
    shown = REPEATED[text]
    for args in (SECRET, "two\nlines", "with args beginning with: x", ""):
        assert ReplyError(text.format(args)).message == shown
    long = ReplyError(text.format("x" * 9000)).message
    assert long.startswith(f"{shown}… (")
    assert "xx" not in long
    assert clean(long) == long


@pytest.mark.parametrize(
    "text",
    [
        "ERR wrong number of arguments for 'get' command",
        "ERR unknown subcommand 'MYID'. Try CLUSTER HELP.",
        "ERR Unknown subcommand or wrong number of arguments for 'SETINFO'. Try CLIENT HELP",
        "NOPERM User app has no permissions to run the 'evalsha' command",
        "NOPERM this user has no permissions to access one of the keys used as arguments",
        "ERR script: Unknown Redis command called from script script: abc, on @user_script:12.",
        "ERR unknown command 'CLIENT|SETINFO'",
        "ERR command AUTH not allowed by this proxy",
        "CROSSSLOT Keys in request don't hash to the same slot",
        "invalid request",
    ],
)
def test_other_texts_stay_whole(text: str) -> None:
    assert ReplyError(text).message == text


def test_a_hidden_text_is_never_shown() -> None:
    word = Hidden(SECRET)
    assert (str(word), repr(word), f"{word}") == ("***", "***", "***")
    assert word.reveal() == SECRET
    assert (word == Hidden(SECRET), word == SECRET) == (True, False)
    assert not hasattr(word, "__dict__")
