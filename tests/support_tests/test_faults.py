"""The proxy and the fake server do what the tests of connections rely on."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator

import hiredis
import pytest

from dscache.embedded import TLSFiles
from tests.support.faults import HELLO_REPLY, FakeServer, FaultProxy

PING = b"*1\r\n$4\r\nPING\r\n"
PONG = b"+PONG\r\n"
# Far longer than anything here takes; it only turns a hang into a failure.
PATIENCE = 10


@contextlib.asynccontextmanager
async def connected(
    to: FaultProxy | FakeServer, tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    async with asyncio.timeout(PATIENCE):
        reader, writer = await asyncio.open_connection(to.host, to.port, ssl=tls)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()
            # Whose error would be logged later, in another test, if nobody asked for it.
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def silent(reader: asyncio.StreamReader) -> bool:
    """Whether nothing arrives for a while that is long enough for loopback."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.1):
            await reader.read(1)
            return False
    return True


async def settled(proxy: FaultProxy) -> None:
    while proxy.connections:
        await asyncio.sleep(0.001)


async def test_forwards_and_counts(proxy: FaultProxy) -> None:
    async with connected(proxy) as (reader, writer), connected(proxy) as (_, _):
        writer.write(PING * 2)
        assert await reader.readexactly(2 * len(PONG)) == PONG * 2
        assert proxy.accepted == proxy.connections == 2
        assert proxy.forwarded == {"requests": 2 * len(PING), "replies": 2 * len(PONG)}
    async with asyncio.timeout(PATIENCE):
        await settled(proxy)
    assert proxy.accepted == 2


async def test_delays(proxy: FaultProxy) -> None:
    async with connected(proxy) as (reader, writer):
        writer.write(PING)
        await reader.readexactly(len(PONG))
        proxy.delay(3600)
        writer.write(PING)
        assert await silent(reader)
    proxy.heal()
    proxy.delay(0.01)
    async with connected(proxy) as (reader, writer):
        writer.write(PING)
        assert await reader.readexactly(len(PONG)) == PONG


@pytest.mark.parametrize("direction", ["requests", "replies"])
async def test_stalls_and_resumes(proxy: FaultProxy, direction: str) -> None:
    async with connected(proxy) as (reader, writer):
        writer.write(PING)
        await reader.readexactly(len(PONG))
        proxy.stall(direction)
        writer.write(PING)
        assert await silent(reader)
        passed = proxy.forwarded["requests"]
        assert passed == (len(PING) if direction == "requests" else 2 * len(PING))
        proxy.resume()
        assert await reader.readexactly(len(PONG)) == PONG


async def test_stalls_both_directions_by_default(proxy: FaultProxy) -> None:
    async with connected(proxy) as (reader, writer):
        proxy.stall()
        writer.write(PING)
        assert await silent(reader)
        assert proxy.forwarded == {"requests": 0, "replies": 0}
        proxy.heal()
        assert await reader.readexactly(len(PONG)) == PONG


async def test_cuts_orderly(proxy: FaultProxy) -> None:
    async with connected(proxy) as (reader, writer):
        writer.write(PING)
        await reader.readexactly(len(PONG))
        proxy.cut()
        assert await reader.read() == b""
        await settled(proxy)
    async with connected(proxy) as (reader, writer):
        writer.write(PING)
        assert await reader.readexactly(len(PONG)) == PONG


async def test_cuts_with_a_reset(proxy: FaultProxy) -> None:
    async with connected(proxy) as (reader, writer):
        writer.write(PING)
        await reader.readexactly(len(PONG))
        proxy.cut("rst")
        with pytest.raises(ConnectionResetError):
            await reader.read()


async def test_cuts_a_stalled_connection(proxy: FaultProxy) -> None:
    async with connected(proxy) as (reader, writer):
        writer.write(PING)
        await reader.readexactly(len(PONG))
        proxy.stall()
        writer.write(PING)
        assert await silent(reader)
        proxy.cut()
        assert await reader.read() == b""


@pytest.mark.parametrize("count", [0, 1, 5, len(PONG), len(PONG) + 1])
async def test_cuts_after_a_number_of_bytes_of_the_replies(proxy: FaultProxy, count: int) -> None:
    async with connected(proxy) as (reader, writer):
        proxy.cut_after(count)
        writer.write(PING * 3)
        assert await reader.read() == (PONG * 3)[:count]
    async with connected(proxy) as (reader, writer):
        writer.write(PING)
        assert await reader.readexactly(len(PONG)) == PONG


async def test_cuts_after_a_number_of_bytes_of_the_requests(proxy: FaultProxy) -> None:
    async with connected(proxy) as (reader, writer):
        proxy.cut_after(len(PING) - 1, "requests")
        writer.write(PING)
        assert await reader.read() == b""
        assert proxy.forwarded == {"requests": len(PING) - 1, "replies": 0}


async def test_cuts_over_several_chunks_with_a_reset(proxy: FaultProxy) -> None:
    async with connected(proxy) as (reader, writer):
        proxy.cut_after(len(PONG) + 2, ending="rst")
        writer.write(PING)
        assert await reader.readexactly(len(PONG)) == PONG
        writer.write(PING)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        assert proxy.forwarded["replies"] == len(PONG) + 2


async def test_is_deaf_only_to_new_connections(proxy: FaultProxy) -> None:
    async with connected(proxy) as (old_reader, old_writer):
        old_writer.write(PING)
        await old_reader.readexactly(len(PONG))
        proxy.deaf()
        async with connected(proxy) as (reader, writer):
            writer.write(PING)
            assert await silent(reader)
            old_writer.write(PING)
            assert await old_reader.readexactly(len(PONG)) == PONG
            proxy.cut("rst")
            with pytest.raises(ConnectionResetError):
                await reader.read()
    proxy.heal()
    async with connected(proxy) as (reader, writer):
        writer.write(PING)
        assert await reader.readexactly(len(PONG)) == PONG


async def test_refuses_and_listens_again_on_the_same_port(proxy: FaultProxy) -> None:
    port = proxy.port
    async with connected(proxy) as (reader, writer):
        writer.write(PING)
        await reader.readexactly(len(PONG))
        for _ in range(3):
            await proxy.refuse()
            await proxy.refuse()
            for _ in range(50):
                with pytest.raises(ConnectionRefusedError):
                    await asyncio.open_connection(proxy.host, port)
            writer.write(PING)
            assert await reader.readexactly(len(PONG)) == PONG
            await proxy.listen()
            await proxy.listen()
            assert proxy.port == port
            async with connected(proxy) as (new_reader, new_writer):
                new_writer.write(PING)
                assert await new_reader.readexactly(len(PONG)) == PONG


async def test_duplicates_the_next_reply(proxy: FaultProxy) -> None:
    async with connected(proxy) as (reader, writer):
        proxy.duplicate()
        writer.write(PING)
        assert await reader.readexactly(2 * len(PONG)) == PONG * 2
        writer.write(PING)
        assert await reader.readexactly(len(PONG)) == PONG
        assert await silent(reader)


@pytest.mark.parametrize("direction", ["requests", "replies"])
async def test_corrupts_the_next_chunk(proxy: FaultProxy, direction: str) -> None:
    async with connected(proxy) as (reader, writer):
        proxy.corrupt(lambda chunk: chunk.replace(b"PONG", b"GNOP"), direction)
        proxy.corrupt(lambda chunk: chunk.replace(b"PING", b"GNIP"), direction)
        writer.write(PING)
        first = await reader.readuntil(b"\r\n")
        writer.write(PING)
        second = await reader.readuntil(b"\r\n")
        if direction == "replies":
            assert (first, second) == (b"+GNOP\r\n", PONG)
        else:
            assert first == PONG
            assert second.startswith(b"-ERR unknown command")


async def test_splits_replies(proxy: FaultProxy) -> None:
    async with connected(proxy) as (reader, writer):
        proxy.split(2)
        writer.write(PING * 2)
        pieces = []
        while sum(map(len, pieces)) < 2 * len(PONG):
            pieces.append(await reader.read(100))
        assert b"".join(pieces) == PONG * 2
        assert max(map(len, pieces)) == 2


async def test_ends_connections_whose_target_is_down() -> None:
    async with FaultProxy("127.0.0.1", 1) as proxy, connected(proxy) as (reader, _):
        with pytest.raises(ConnectionResetError):
            await reader.read()


async def test_ends_its_connections_when_it_ends(proxy: FaultProxy) -> None:
    async with FaultProxy(proxy.host, proxy.port) as outer, connected(outer) as (reader, writer):
        writer.write(PING)
        await reader.readexactly(len(PONG))
        outer.stall()
        writer.write(PING)
        await outer.__aexit__()
        assert outer.connections == 0
        with pytest.raises(ConnectionResetError):
            await reader.read()


async def test_speaks_tls(tls_proxy: FaultProxy, certificates: TLSFiles) -> None:
    trusting = ssl.create_default_context(cafile=certificates.authority)
    assert tls_proxy.url == f"rediss://127.0.0.1:{tls_proxy.port}"
    async with connected(tls_proxy, trusting) as (reader, writer):
        writer.write(PING)
        assert await reader.readexactly(len(PONG)) == PONG
        tls_proxy.cut()
        assert await reader.read() == b""
    async with connected(tls_proxy, trusting) as (reader, writer):
        writer.write(PING)
        assert await reader.readexactly(len(PONG)) == PONG
        tls_proxy.cut("rst")
        with pytest.raises(ConnectionResetError):
            await reader.read()
    strict = ssl.create_default_context()
    with pytest.raises(ssl.SSLCertVerificationError):
        await asyncio.open_connection(tls_proxy.host, tls_proxy.port, ssl=strict)
    async with connected(tls_proxy) as (reader, writer):
        writer.write(PING)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            answer = await reader.read()
        assert PONG not in answer


def command(*words: bytes) -> bytes:
    return hiredis.pack_command(words)


async def test_fake_server_sends_the_given_replies() -> None:
    answers = {
        "GET": b"$1\r\nx\r\n",
        "MGET": lambda words: b"*%d\r\n" % (len(words) - 1) + b"$-1\r\n" * (len(words) - 1),
        "SET": b"",
        "*": b"!garbage",
        "QUIT": None,
    }
    async with FakeServer(answers) as fake, connected(fake) as (reader, writer):
        writer.write(command(b"HELLO", b"3"))
        assert await reader.readexactly(len(HELLO_REPLY)) == HELLO_REPLY
        writer.write(command(b"get", b"k") + command(b"MGET", b"a", b"b"))
        expected = b"$1\r\nx\r\n*2\r\n$-1\r\n$-1\r\n"
        assert await reader.readexactly(len(expected)) == expected
        writer.write(command(b"SET", b"k", b"v") + command(b"NONSENSE"))
        assert await reader.readexactly(8) == b"!garbage"
        fake.push(b">0\r\n")
        assert await reader.readexactly(4) == b">0\r\n"
        assert fake.connections == fake.accepted == 1
        writer.write(command(b"QUIT"))
        assert await reader.read() == b""
        assert fake.connections == 0
        assert fake.commands[1:4] == [[b"get", b"k"], [b"MGET", b"a", b"b"], [b"SET", b"k", b"v"]]


def test_hiredis_reads_its_handshake() -> None:
    parser = hiredis.Reader(encoding="ascii")
    parser.feed(HELLO_REPLY)
    assert parser.gets() == {
        "server": "redis",
        "version": "7.0.0",
        "proto": 3,
        "id": 1,
        "mode": "standalone",
        "role": "master",
        "modules": [],
    }


async def test_fake_server_ends_its_connections_when_it_ends() -> None:
    async with FakeServer() as fake, connected(fake) as (reader, writer):
        writer.write(PING)
        assert await reader.readexactly(len(PONG)) == PONG
        await fake.__aexit__()
        assert fake.connections == 0
        with pytest.raises(ConnectionResetError):
            await reader.read()
