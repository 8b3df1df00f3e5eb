"""Messages to and from deepstream's own connector, ``@deepstream/clusternode-redis``, on Node.

It comes from npm. Without Node, or if npm can't get it, a recording of the connector replaces it,
and the tests print that.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
import redis.asyncio

from dscache.embedded import EmbeddedServer
from tests.conftest import NamedServer
from tests.support.message_nodes import Nodes, open_nodes, receive_on
from tests.support.waiting import until

HERE = Path(__file__).parents[1]
GOLDEN = json.loads((HERE / "api" / "golden" / "messages_by_connector.json").read_text("utf-8"))
# It requires more than it declares.
PACKAGES = ("@deepstream/clusternode-redis@1.0.1", "@deepstream/protobuf@1.0.8")
MESSAGES = [one["message"] for one in GOLDEN["sent"] if one["server_name"] == "A"]
TOPICS = sorted({json.loads(message)["topic"] for message in MESSAGES})


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """The folder in which the connector was installed, or None if that is impossible."""
    folder = tmp_path_factory.mktemp("connector")
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        print("there is no Node here: the recorded connector stands in for the real one")
        return None
    (folder / "package.json").write_text('{"private": true}', encoding="utf-8")
    options = [
        "--ignore-scripts",
        "--prefer-offline",
        "--no-audit",
        "--no-fund",
        "--loglevel=error",
    ]
    try:
        subprocess.run(
            [npm, "install", *options, *PACKAGES],
            cwd=folder,
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=120,
        )
    except (subprocess.SubprocessError, OSError) as error:
        print(f"npm can't get the connector ({error}): the recorded one stands in for it")
        return None
    return folder


class Real:
    """The connector itself, in its own process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def do(self, action: str, name: str, **more: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"do": action, "name": name, **more}
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        return json.loads(await self._process.stdout.readline())


class Recorded:
    """A recording of the connector's actions, replayed."""

    def __init__(self, server: EmbeddedServer | NamedServer) -> None:
        self._redis: Any = redis.asyncio.Redis(host=server.host, port=server.port)
        self._pubsub = self._redis.pubsub(ignore_subscribe_messages=True)
        self._heard: list[tuple[str, str]] = []

    async def do(self, action: str, name: str, **more: Any) -> Any:
        if action == "subscribe":
            await self._pubsub.subscribe(str(more["topic"]))
        elif action in ("send", "sendDirect"):
            envelope = {"fromServer": name, "toServer": more.get("to"), "message": None}
            parts = {key: value for key, value in envelope.items() if value is not None}
            written = json.dumps(parts | {"message": 0}, separators=(",", ":"), ensure_ascii=False)
            recorded = next(
                base64.b64decode(one["payload"])
                for one in GOLDEN["sent"]
                if one["message"] == more["message"]
            )
            body = recorded.partition(b'"message":')[2]
            topic = json.loads(more["message"])["topic"]
            await self._redis.publish(str(topic), written.encode()[:-2] + body)
        elif action == "heard":
            while message := await self._pubsub.get_message(timeout=0):
                opened = json.loads(message["data"])
                mine = opened.get("toServer", name) == name and opened["fromServer"] != name
                if mine:
                    text = message["data"].decode().partition('"message":')[2][:-1]
                    self._heard.append((text, opened["fromServer"]))
            return self._heard
        return None

    async def aclose(self) -> None:
        await self._pubsub.aclose()
        await self._redis.aclose()


@pytest.fixture
async def connector(
    installed: Path | None, server: EmbeddedServer | NamedServer
) -> AsyncIterator[Real | Recorded]:
    """deepstream's connector on ``server``, or its recording."""
    if installed is None:
        recorded = Recorded(server)
        yield recorded
        await recorded.aclose()
        return
    process = await asyncio.create_subprocess_exec(
        *(
            "node",
            str(HERE / "programs" / "connector.js"),
            str(installed),
            server.host,
            str(server.port),
        ),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield Real(process)
    finally:
        if process.stdin is not None:
            process.stdin.close()
        await process.wait()


@pytest.fixture
async def nodes(
    server: EmbeddedServer | NamedServer, backend: str, redis: redis_py.Redis
) -> AsyncIterator[Nodes]:
    async with open_nodes(host=server.host, port=server.port) as opened:
        yield opened


async def subscribe(connector: Real | Recorded, redis: redis_py.Redis, name: str) -> None:
    """Have the connector subscribe, and wait until Redis has the subscription."""
    counts = {topic: redis.pubsub_numsub(str(topic))[0][1] for topic in TOPICS}
    for topic in TOPICS:
        await connector.do("subscribe", name, topic=topic)
    await until(
        lambda: all(
            redis.pubsub_numsub(str(topic))[0][1] > count for topic, count in counts.items()
        )
    )


class Tap:
    """All published messages, byte for byte."""

    def __init__(self, server: EmbeddedServer | NamedServer) -> None:
        self._redis = redis_py.Redis(server.host, server.port)
        self._pubsub = self._redis.pubsub()

    async def __aenter__(self) -> Tap:
        self._pubsub.psubscribe("*")
        async with asyncio.timeout(60):
            while self._pubsub.get_message() is None:
                await asyncio.sleep(0.001)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._pubsub.close()
        self._redis.close()

    async def take(self, count: int) -> list[tuple[bytes, bytes]]:
        """Return that many messages: their channels and their bytes."""
        found: list[tuple[bytes, bytes]] = []
        async with asyncio.timeout(60):
            while len(found) < count:
                if (message := self._pubsub.get_message()) is None:
                    await asyncio.sleep(0.001)
                else:
                    found.append((message["channel"], message["data"]))
        return found


async def test_messages_in_both_directions(
    connector: Real | Recorded,
    nodes: Nodes,
    server: EmbeddedServer | NamedServer,
    redis: redis_py.Redis,
) -> None:
    print(f"{type(connector).__name__.lower()} connector, {server}")
    node = await nodes("py")
    received = [await receive_on(node, topic) for topic in TOPICS]
    everything = received[0]
    for topic in TOPICS[1:]:
        node.subscribe(topic, everything)
    await node.when_ready()
    await connector.do("open", "js")
    await subscribe(connector, redis, "js")
    async with Tap(server) as tap:
        # To all, to this node alone, to another, and one that must not be delivered back.
        for message in MESSAGES:
            await connector.do("send", "js", message=message)
            await connector.do("sendDirect", "js", to="py", message=message)
            await connector.do("sendDirect", "js", to="elsewhere", message=message)
        theirs = await tap.take(3 * len(MESSAGES))
        await everything.reaches(2 * len(MESSAGES))
        expected = [json.loads(message) for message in MESSAGES for _ in range(2)]
        assert sorted(everything, key=str) == sorted(expected, key=str)
        assert set(everything.senders) == {"js"}

        for message in MESSAGES:
            await node.send(json.loads(message))
            await node.send_direct("js", json.loads(message))
            await node.send_direct("elsewhere", json.loads(message))
        ours = await tap.take(3 * len(MESSAGES))
    async with asyncio.timeout(60):
        while len(told := await connector.do("heard", "js")) < 2 * len(MESSAGES):
            await asyncio.sleep(0.01)
    assert {sender for _, sender in told} == {"py"}
    values = [json.loads(text) for text, _ in told]
    assert sorted(values, key=str) == sorted(expected, key=str)
    # No node received its own messages, or those for another node.
    assert len(everything) == 2 * len(MESSAGES)
    assert node.stats()["own"] == 3 * len(MESSAGES)
    assert node.stats()["foreign"] == len(MESSAGES)

    renamed = [(channel, text.replace(b'r":"js"', b'r":"py"', 1)) for channel, text in theirs]
    for message, their, our in zip(
        (message for message in MESSAGES for _ in range(3)), renamed, ours, strict=True
    ):
        if '"to"' in message or b'"toServer":"py"' in their[1]:
            their = (their[0], their[1].replace(b'"toServer":"py"', b'"toServer":"js"', 1))
        # JavaScript formats 1e-7 and 0.000001 differently; the values are equal.
        if '"n":' in message:
            assert json.loads(their[1]) == json.loads(our[1])
        else:
            assert their == our


async def test_the_connector_receives_numbers(
    connector: Real | Recorded, nodes: Nodes, redis: redis_py.Redis
) -> None:
    node = await nodes("py")
    await connector.do("open", "js")
    await subscribe(connector, redis, "js")
    await node.send({"topic": TOPICS[0], "n": [1.0, 1e21, 2**53, -0.0, True, None]})
    async with asyncio.timeout(60):
        while not (told := await connector.do("heard", "js")):
            await asyncio.sleep(0.01)
    assert json.loads(told[0][0])["n"] == [1, 1e21, 2**53, 0, True, None]
