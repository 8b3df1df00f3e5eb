"""URLs such as ``redis://user:password@host:6379/0``, parsed into options of the configuration.

The rules are redis-py's, with one difference: redis-py ignores parts that it doesn't understand,
such as a database that is no number, while here they are errors. No error shows a password,
wherever a missing percent-escape has put it.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from typing import Final, NamedTuple
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from . import ioredis
from .validation import Location, nearest

_logger = logging.getLogger("dscache")

HOST: Final = r"(\[[0-9A-Fa-f:.%\w]+\]|[^\s:/@\[\]]+)"
HOST_AND_PORT: Final = re.compile(rf"{HOST}:([0-9]{{1,5}})")
"""``host:port`` as a source; the port's range is checked with the option ``port``."""
LOCALHOST: Final = "localhost"
"""The one bare host name that is a source; any other would hide the mistyped path of a file."""
SCHEMES = "redis://, rediss:// or unix://"
_ESCAPE = "write the special characters of the password percent-encoded (@ %40, / %2F, # %23)"

_SOCKET = "a socket's path begins with a third slash: unix:///run/redis.sock"


class ParsedUrl(NamedTuple):
    """A parsed URL: the options by their names in a file, and the URL without its password."""

    options: dict[str, object]
    shown: str


def parse(url: str, place: Location) -> ParsedUrl:
    """Return the options that a URL or ``host:port`` states, without any defaults.

    Raises ConfigError, which never quotes a part that may hold a password.
    """
    if url == LOCALHOST:
        return ParsedUrl({"host": url}, url)
    if HOST_AND_PORT.fullmatch(url):
        bare_host, _, bare_port = url.rpartition(":")
        return ParsedUrl({"host": bare_host.strip("[]"), "port": bare_port}, url)
    if url.strip(" ") != url:
        raise place.error("begins or ends with a space; leave it out")
    # Valkey's tools use these for the same thing.
    if (alias := re.match(r"valkey(s?)://", url, re.IGNORECASE)) is not None:
        url = f"redis{alias[1].lower()}://{url[alias.end() :]}"
    scheme, separator, _ = url.partition("://")
    if not separator:
        is_variable = re.fullmatch(r"\$[A-Za-z_]\w*", url)
        braces = "; the value of a variable is written as in ${REDIS_URL}" if is_variable else ""
        if url.startswith("${"):
            braces = "; ${...} is replaced by a variable's value in files alone"
        raise place.error(f"must begin with {SCHEMES}, or be like 127.0.0.1:6379{braces}")
    if scheme.lower() not in ("redis", "rediss", "unix"):
        named = f", not {scheme}://" if scheme.isalnum() and len(scheme) <= 20 else ""
        raise place.error(f"must begin with {SCHEMES}{named}")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise place.error(_flaw_of_server(url)) from None
    is_unix = parts.scheme == "unix"
    _refuse_spilled_password(url, parts, is_unix, place)
    options, tls = _query(parts.query, place)
    encoded = {"username": parts.username, "password": parts.password}
    if is_unix:
        if parts.netloc.rpartition("@")[2] or len(parts.path) < 2:
            raise place.error(_SOCKET)
        encoded["path"] = parts.path
        shown = f"unix://{parts.path}"
    else:
        encoded["host"] = parts.hostname
        if port is not None:
            options["port"] = port
        database = parts.path.strip("/")
        if database and not re.fullmatch(r"[0-9]{1,10}", database):
            raise place.error("the path must be the number of a database, as in redis://host/3")
        if database:
            options.setdefault("db", database)
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    try:
        options |= {name: unquote(one, errors="strict") for name, one in encoded.items() if one}
    except UnicodeDecodeError:
        raise place.error("the percent-encoded text isn't UTF-8") from None
    if parts.scheme == "rediss":
        options["tls"] = tls
    elif tls:
        raise place.error("the ssl_ options need a URL that begins with rediss://")
    return ParsedUrl(options, shown)


def _flaw_of_server(url: str) -> str:
    """Return why the host and port of a URL can't be read; it quotes neither."""
    server, *rest = re.split(r"[/?#]", url.partition("://")[2], maxsplit=1)
    if any("@" in part for part in rest):
        return f"the host or the port can't be read; {_ESCAPE}"
    if url[:5].lower() == "unix:":
        return _SOCKET
    server = server.rpartition("@")[2]
    if "[" in server or "]" in server or re.fullmatch(r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*:\S*", server):
        return "an IPv6 address is written in brackets, as in redis://[::1]:6379"
    is_number = server.rpartition(":")[2].isdecimal()
    remedy = "" if is_number or "@" in url else "; a password is followed by @ and the host"
    return f"the port must be a whole number from 1 to 65535{remedy}"


def _refuse_spilled_password(url: str, parts: SplitResult, is_unix: bool, place: Location) -> None:
    """Refuse a password whose unescaped / ? or # ended the host too early."""
    late = "" if is_unix else parts.path + ("" if "@" in parts.netloc else parts.query)
    if "#" in url or "@" in late:
        raise place.error(f"an @ or # is in the wrong place; {_ESCAPE}")


def _query(query: str, place: Location) -> tuple[dict[str, object], dict[str, object]]:
    """Return the options that the query states: the general ones, and the ones of TLS."""
    options: dict[str, object] = {}
    tls: dict[str, object] = {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, errors="strict")
    except ValueError:
        raise place.error(f"the query can't be read; {_ESCAPE}") from None
    for name, value in pairs:
        if name in ioredis.NO_EFFECT_OUTSIDE:
            reason = ioredis.NO_EFFECT_OUTSIDE[name]
            _logger.info("%s has no effect: %s", place.at(name), reason)
            continue
        if name not in QUERY_OPTIONS:
            best = nearest(name, QUERY_OPTIONS)
            known = ", ".join(QUERY_OPTIONS)
            remedy = f'did you mean "{best}"?' if best else f"the options are {known}"
            shown = name if name.isidentifier() and len(name) <= 40 else "?"
            raise place.error(f'unknown query option "{shown}", {remedy}')
        group, option, read = QUERY_OPTIONS[name]
        try:
            result = read(value)
        except (KeyError, ValueError, OverflowError):
            expected = _EXPECTED.get(read, "something else")
            raise place.error(f"the query option {name} must be {expected}") from None
        if group:
            (tls if group == "tls" else options)[option] = result
    return options, tls


def _milliseconds(seconds: str) -> int:
    value = float(seconds) * 1000
    if not 0.5 <= value < math.inf:
        raise ValueError(seconds)
    return round(value)


def _boolean(word: str) -> bool:
    return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
        word.lower()
    ]


def _verified(word: str) -> bool:
    # A server always has a certificate: "optional" differs from "required" for servers only.
    return {"none": False, "optional": True, "required": True}[word.lower()]


def _protocol(version: str) -> None:
    if version not in ("2", "3"):
        raise ValueError(version)


_EXPECTED: dict[Callable[[str], object], str] = {
    _milliseconds: "a number of seconds above 0",
    _boolean: "true or false",
    _verified: "none, optional or required",
    _protocol: "2 or 3",
}

# redis-py's name: the group (options or tls), the option's name in it, and the reader.
QUERY_OPTIONS: dict[str, tuple[str, str, Callable[[str], object]]] = {
    "db": ("options", "db", str),
    "username": ("options", "username", str),
    "password": ("options", "password", str),
    "client_name": ("options", "connectionName", str),
    "socket_timeout": ("options", "commandTimeout", _milliseconds),
    "socket_connect_timeout": ("options", "connectTimeout", _milliseconds),
    "ssl_ca_certs": ("tls", "ca", str),
    "ssl_certfile": ("tls", "cert", str),
    "ssl_keyfile": ("tls", "key", str),
    "ssl_cert_reqs": ("tls", "rejectUnauthorized", _verified),
    "ssl_check_hostname": ("tls", "checkHostname", _boolean),
    # Accepted without effect: the client chooses the protocol.
    "protocol": ("", "", _protocol),
}
