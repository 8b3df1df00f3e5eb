"""Remote procedure calls from Python to JavaScript clients, and from JavaScript to Python.

The server that a requesting client is connected to chooses a provider: one of its own clients, or
another server that has the RPC's name in the registry RPC_SUBSCRIPTIONS. It sends that server a
REQUEST. It waits for ACCEPT until ``rpc.ackTimeout``, and for RESPONSE or REQUEST_ERROR until
``rpc.responseTimeout``. After REJECT or NO_RPC_PROVIDER it chooses another provider. A peer plays
both parts.

Source: ``@deepstream/server`` 7.0.2, ``handlers/rpc``.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from ..core.failures import closed
from ..errors import DscacheError, MessageError, RPCError, RPCTimeout, UsageError, shorten
from ..pubsub.encoding import decode_text, encode_text
from .cluster import ClusterMember
from .protocol import RPCAction, RPCMessage, Topic
from .settings import Settings

if TYPE_CHECKING:
    from ..core.pure import Message
    from ..messages import MessageNode

_logger = logging.getLogger("dscache")

# An async handler that rejects or answers sooner needs no ACCEPT. A part of ackTimeout.
_ACCEPT_AFTER: Final = 0.2
_MAX_RUNNING: Final = 1000

Handler = Callable[[Any], Any]


class Reject(Exception):  # an instruction of a handler, and no failure
    """Raised by a handler that can't serve a request now, so that another provider is tried.

    Raise it within a fifth of ``rpc.ackTimeout``. After that time the request is accepted, and this
    error fails the request.
    """


class _Received(msgspec.Struct, rename="camel"):
    action: int
    name: str
    correlation_id: str
    data: str | UnsetType | None = UNSET
    parsed_data: Any = UNSET


class _Provider:
    """The handler of an RPC, and the requests that it serves now."""

    def __init__(self, handler: Handler, max_running: int) -> None:
        self.handler = handler
        self.max_running = max_running
        self.running = 0


class _Request:
    """A request of this process that waits for its response."""

    def __init__(self, name: str, result: asyncio.Future[Any]) -> None:
        self.name = name
        self.result = result
        self.is_accepted = False
        self.server = ""


class RPCs:
    """The remote procedure calls of a peer: ``peer.rpc``."""

    def __init__(self, node: MessageNode, member: ClusterMember, settings: Settings) -> None:
        self._node = node
        self._member = member
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._providers: dict[str, _Provider] = {}
        self._requests: dict[str, _Request] = {}
        self._tasks: set[asyncio.Future[Any]] = set()
        self._is_damage_logged = False
        self._is_closed = False
        self.made = self.served = self.rejected = self.failed = self.late = 0
        self._unsubscribe = node.subscribe(Topic.RPC, self._on_message)

    # -- the provider

    def provide(
        self, name: str, handler: Handler, *, max_running: int = _MAX_RUNNING
    ) -> Callable[[], None]:
        """Provide an RPC by ``handler(data)``; return a function that ends it.

        The handler returns the result, or an awaitable of it. If the handler raises, the exception
        decides what follows:

        - Reject, within a fifth of ``rpc.ackTimeout``: another provider is tried
        - RPCError: the caller gets the error's ``data``, or its text if that is None
        - any other exception: the caller gets its type, and it is logged

        At most ``max_running`` requests run at once; further ones are rejected. An async handler is
        cancelled after ``rpc.responseTimeout``, when the caller has had an error already.

        Raises UsageError for a bad argument, or if this peer provides that RPC already.
        """
        self._check_open()
        _check_name("provide", name)
        if not callable(handler):
            raise UsageError(f"provide: handler must be callable, not {shorten(handler)}")
        if not isinstance(max_running, int) or isinstance(max_running, bool) or max_running < 1:
            raise UsageError(f"provide: max_running must be at least 1, not {shorten(max_running)}")
        if name in self._providers:
            raise UsageError(f"provide: this peer provides {shorten(name)} already")
        provider = self._providers[name] = _Provider(handler, max_running)
        self._member.provide(name)

        def unprovide() -> None:
            if self._providers.get(name) is provider:
                del self._providers[name]
                self._member.unprovide(name)

        return unprovide

    def _serve(self, received: _Received, server: str | None) -> None:
        """Serve the request of a server, or of this process if ``server`` is None."""
        provider = self._providers.get(received.name)
        if provider is None:
            self._reply(received, server, RPCAction.NO_RPC_PROVIDER)
            return
        if provider.running >= provider.max_running:
            self.rejected += 1
            self._reply(received, server, RPCAction.REJECT)
            return
        try:
            data = _data_of(received)
            result = provider.handler(data)
        except Exception as error:
            self._fail(received, server, error, is_accepted=False)
            return
        if inspect.isawaitable(result):
            provider.running += 1
            task = self._loop.create_task(
                self._await(received, server, result), name=f"dscache rpc {received.name}"
            )
            self._tasks.add(task)
            task.add_done_callback(lambda task: self._on_served(task, provider))
        else:
            self._succeed(received, server, result)

    async def _await(self, received: _Received, server: str | None, result: Any) -> None:
        """Await a handler's result; send ACCEPT if that takes longer."""
        answer = asyncio.ensure_future(result)
        try:
            patience = self._settings.ack_timeout * _ACCEPT_AFTER
            done, _ = await asyncio.wait([answer], timeout=patience)
            is_accepted = not done
            if is_accepted:
                self._reply(received, server, RPCAction.ACCEPT)
                patience = self._settings.response_timeout - patience
                done, _ = await asyncio.wait([answer], timeout=max(patience, 0))
            if not done:
                # The server has given an error to the caller, and would log a later response.
                self.late += 1
                return
        finally:
            answer.cancel()
        try:
            value = answer.result()
        except asyncio.CancelledError:
            cancelled = RPCError("the handler was cancelled", reason="REQUEST_ERROR")
            self._fail(received, server, cancelled, is_accepted)
        except Exception as error:
            self._fail(received, server, error, is_accepted)
        else:
            self._succeed(received, server, value)

    def _on_served(self, task: asyncio.Task[None], provider: _Provider) -> None:
        self._tasks.discard(task)
        provider.running -= 1
        if not task.cancelled() and (error := task.exception()) is not None:
            _logger.error("serving an RPC failed", exc_info=error)

    def _succeed(self, received: _Received, server: str | None, value: Any) -> None:
        try:
            text = encode_text("the result of the RPC", value)
        except MessageError as error:
            self._fail(received, server, error, is_accepted=True)
            return
        self.served += 1
        self._reply(received, server, RPCAction.RESPONSE, text)

    def _fail(
        self, received: _Received, server: str | None, error: Exception, is_accepted: bool
    ) -> None:
        if isinstance(error, Reject) and not is_accepted:
            self.rejected += 1
            self._reply(received, server, RPCAction.REJECT)
            return
        self.failed += 1
        data: Any = f"{received.name} failed: {type(error).__name__}"
        if isinstance(error, RPCError):
            data = str(error) if error.data is None else error.data
        elif isinstance(error, Reject):
            # A server that has an ACCEPT can't choose another provider without logging an error.
            data = f"{received.name} was rejected too late"
        else:
            _logger.error("the handler of RPC %s failed", shorten(received.name), exc_info=error)
        try:
            text = encode_text("the error of the RPC", data)
        except MessageError:
            text = encode_text("the error of the RPC", str(error))
        self._reply(received, server, RPCAction.REQUEST_ERROR, text)

    def _reply(
        self,
        received: _Received,
        server: str | None,
        action: RPCAction,
        data: str | UnsetType = UNSET,
    ) -> None:
        message = RPCMessage(
            name=received.name, correlation_id=received.correlation_id, action=action, data=data
        )
        if server is None:
            answer = _Received(action, received.name, received.correlation_id, data)
            self._loop.call_soon(self._on_answer, answer)
            return
        with suppress(DscacheError):  # the caller's server reports a timeout
            self._keep(self._node.send_direct(server, message))

    def _keep(self, sent: asyncio.Future[int]) -> None:
        """Keep a message until it is sent. A failure is logged; the other server times out."""
        self._tasks.add(sent)
        sent.add_done_callback(self._on_sent)

    def _on_sent(self, sent: asyncio.Future[int]) -> None:
        self._tasks.discard(sent)
        if not sent.cancelled() and (error := sent.exception()) is not None:
            _logger.info("an answer to an RPC was not sent: %s", error)

    # -- the requestor

    async def make(
        self,
        name: str,
        data: Any = None,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 # that of the call, and part of its name
    ) -> Any:
        """Call an RPC; the result is the data that its provider returned.

        A provider of this peer is called without a server in between. Otherwise a server that has a
        provider gets the request. After a rejection, another provider is tried. ``data`` is any
        value that msgspec encodes. ``timeout`` is in seconds, by default ``rpc.responseTimeout``.

        Raises RPCTimeout if no acceptance or response comes in time, and RPCError if the call fails
        otherwise. The ``reason`` of an RPCError is NO_RPC_PROVIDER if there is no provider or all
        have rejected. It is REQUEST_ERROR with the provider's ``data`` if the provider fails, and
        CLOSED if the peer is closed. Raises UsageError for a bad name or timeout, and MessageError
        for data that can't be encoded.
        """
        self._check_open()
        _check_name("make", name)
        text = encode_text("the data of the RPC", data)
        seconds = self._settings.response_timeout if timeout is None else timeout
        if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not seconds > 0:
            raise UsageError(f"make: timeout must be a number above 0, not {shorten(timeout)}")
        self.made += 1
        try:
            async with asyncio.timeout(seconds):
                return await self._make(name, text)
        except TimeoutError as error:
            if isinstance(error, DscacheError):
                raise
            raise RPCTimeout(
                f"RPC {shorten(name)}: no response within {seconds:g} s", reason="RESPONSE_TIMEOUT"
            ) from None

    async def _make(self, name: str, text: str) -> Any:
        tried: set[str | None] = set()
        correlation_id = uuid.uuid4().hex
        while True:
            server = await self._choose(name, tried)
            tried.add(server)
            request = _Request(name, self._loop.create_future())
            request.server = server or ""
            self._requests[correlation_id] = request
            try:
                if server is None:
                    asked = _Received(RPCAction.REQUEST, name, correlation_id, text)
                    self._loop.call_soon(self._serve, asked, None)
                else:
                    await self._node.send_direct(
                        server,
                        RPCMessage(
                            name=name,
                            correlation_id=correlation_id,
                            action=RPCAction.REQUEST,
                            data=text,
                        ),
                    )
                    self._watch_acceptance(request)
                return await request.result
            except _NextProvider:
                continue
            finally:
                self._requests.pop(correlation_id, None)

    async def _choose(self, name: str, tried: set[str | None]) -> str | None:
        """Return a server with a provider, or None for this process; raises RPCError."""
        if name in self._providers and None not in tried:
            return None
        servers = [one for one in self._member.providers.servers(name) if one not in tried]
        if not servers and not tried:
            await self._wait_for_provider(name)
            servers = self._member.providers.servers(name)
        if not servers:
            rejected = " left, as each has rejected the request" if tried else ""
            raise RPCError(
                f"RPC {shorten(name)}: there is no provider{rejected}", reason="NO_RPC_PROVIDER"
            )
        return random.choice(servers)

    async def _wait_for_provider(self, name: str) -> None:
        """Wait until the other servers have told which RPCs they provide, or one this RPC."""
        seconds = self._member.settled_at - self._loop.time()
        if seconds <= 0:
            return
        found = asyncio.Event()

        def on_changed(changed: str, is_there: bool) -> None:
            if changed == name and is_there:
                found.set()

        self._member.providers.changed.append(on_changed)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await found.wait()
        finally:
            self._member.providers.changed.remove(on_changed)

    def _watch_acceptance(self, request: _Request) -> None:
        """Fail a request that its server neither accepts nor answers, as after its death."""

        def check() -> None:
            if not request.is_accepted and not request.result.done():
                request.result.set_exception(
                    RPCTimeout(
                        f"RPC {shorten(request.name)}: server {shorten(request.server)} has not "
                        "accepted it in time",
                        reason="ACCEPT_TIMEOUT",
                    )
                )

        # The server itself reports its client's silence after ackTimeout.
        timer = self._loop.call_later(self._settings.ack_timeout * 1.5, check)
        request.result.add_done_callback(lambda _: timer.cancel())

    def _on_answer(self, received: _Received) -> None:
        request = self._requests.get(received.correlation_id)
        if request is None or request.result.done():
            return
        shown = f"RPC {shorten(request.name)}"
        result = request.result
        match received.action:
            case RPCAction.ACCEPT:
                request.is_accepted = True
            case RPCAction.RESPONSE:
                try:
                    result.set_result(_data_of(received))
                except MessageError as error:
                    result.set_exception(error)
            case RPCAction.REQUEST_ERROR:
                try:
                    data = _data_of(received)
                except MessageError:
                    data = None
                text = data if isinstance(data, str) else shorten(data)
                result.set_exception(RPCError(f"{shown}: the provider failed: {text}", data=data))
            case RPCAction.REJECT | RPCAction.NO_RPC_PROVIDER:
                result.set_exception(_NextProvider())
            case RPCAction.ACCEPT_TIMEOUT | RPCAction.RESPONSE_TIMEOUT:
                reason = RPCAction(received.action).name
                result.set_exception(
                    RPCTimeout(f"{shown}: the provider has not answered in time", reason=reason)
                )

    # -- both

    def _on_message(self, message: Message, sender: str) -> None:
        try:
            received = message.decode(_Received)
        except MessageError as error:
            if not self._is_damage_logged:
                self._is_damage_logged = True
                _logger.warning("an RPC message was ignored: %s", error)
            return
        if received.action == RPCAction.REQUEST:
            self._serve(received, sender)
        else:
            self._on_answer(received)

    def _check_open(self) -> None:
        if self._is_closed:
            raise closed("peer")

    async def close(self) -> None:
        """End all providers and requests."""
        self._is_closed = True
        self._unsubscribe()
        for name in list(self._providers):
            del self._providers[name]
            self._member.unprovide(name)
        for request in self._requests.values():
            if not request.result.done():
                request.result.set_exception(
                    RPCError(f"RPC {shorten(request.name)}: the peer was closed", reason="CLOSED")
                )
        serving = [task for task in self._tasks if isinstance(task, asyncio.Task)]
        for task in serving:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)

    def stats(self) -> dict[str, int]:
        """Return the counters of calls."""
        return {
            "rpcs_made": self.made,
            "rpcs_served": self.served,
            "rpcs_rejected": self.rejected,
            "rpcs_failed": self.failed,
            "rpcs_late": self.late,
            "providers": len(self._providers),
        }


class _NextProvider(Exception):  # it never leaves this module
    """The provider has rejected the request."""


def _check_name(operation: str, name: object) -> None:
    if not isinstance(name, str) or not name:
        raise UsageError(
            f"{operation}: the name of an RPC must be a text that is not empty, not {shorten(name)}"
        )
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{operation}: name {shorten(name)} has a lone surrogate") from None


def _data_of(received: _Received) -> Any:
    """Return the decoded data of a message; None if it has none. Raises MessageError."""
    return decode_text(f"RPC {shorten(received.name)}", received.data, received.parsed_data)
