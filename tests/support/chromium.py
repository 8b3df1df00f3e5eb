"""A headless Chromium, controlled over its DevTools protocol.

``make docs-test`` unpacks one where the machine has none and apt-get exists; nothing is installed.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar

from websockets.sync.client import ClientConnection, connect

T = TypeVar("T")

PATIENCE = 60
"""Seconds for anything that takes a moment on an idle machine."""
NAMES = (
    *("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"),
    "google-chrome-stable",
)


class NoChromiumError(Exception):
    """Neither the machine nor the environment has a Chromium."""


def find() -> tuple[str, dict[str, str]]:
    """Return a Chromium's path and environment: the unpacked one, or else the machine's.

    Raises NoChromiumError.
    """
    unpacked = Path(sys.prefix) / "chromium"
    program = unpacked / "usr" / "lib" / "chromium" / "chromium-headless-shell"
    if program.exists():
        folders = {str(path.parent) for path in unpacked.rglob("*.so*")}
        return str(program), {**os.environ, "LD_LIBRARY_PATH": ":".join(sorted(folders))}
    for name in NAMES:
        if found := shutil.which(name):
            return found, dict(os.environ)
    raise NoChromiumError(f"found no Chromium: none of {', '.join(NAMES)} is in PATH; install one")


def eventually(get: Callable[[], T | None]) -> T:
    """Return the first true result of ``get``. Raises TimeoutError."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := get():
            return found
        time.sleep(0.02)
    raise TimeoutError(f"no result within {PATIENCE} s")


class Browser:
    """A Chromium with one page, and the problems that the page has had."""

    def __init__(self) -> None:
        program, environment = find()
        self._opened = contextlib.ExitStack()
        folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._opened.enter_context(folder)
        # A user namespace, which the sandbox needs, may be forbidden. Only this site is opened.
        self._process = subprocess.Popen(
            [
                *(program, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
                *("--disable-dev-shm-usage", "--disable-background-networking"),
                *("--hide-scrollbars", "--remote-debugging-port=0"),
                f"--user-data-dir={folder.name}",
                "about:blank",
            ],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._opened.callback(self._end)
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self.problems: list[str] = []
        """Errors of the console, exceptions, and requests that failed."""
        self.requests: list[str] = []
        """The addresses of all requests."""
        self._loaded = False
        try:
            assert self._process.stderr is not None
            address = _address(self._process.stderr)
            made = connect(address, max_size=None)
            self._connection: ClientConnection = self._opened.enter_context(made)
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
            self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        except BaseException:
            self._opened.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.close()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stderr is not None:
            self._process.stderr.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command; return its result. Raises RuntimeError for an error."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._connection.send(json.dumps(message))
        while True:
            received = self._receive()
            if received.get("id") == number:
                if "error" in received:
                    raise RuntimeError(f"{method}: {received['error']['message']}")
                result: dict[str, Any] = received["result"]
                return result

    def _receive(self) -> dict[str, Any]:
        received: dict[str, Any] = json.loads(self._connection.recv(timeout=PATIENCE))
        event = received.get("params", {})
        match received.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Network.requestWillBeSent":
                self.requests.append(event["request"]["url"])
            case "Network.responseReceived" if event["response"]["status"] >= 400:
                self.problems.append(f"{event['response']['status']} {event['response']['url']}")
            # Leaving a page cancels what it still loads.
            case "Network.loadingFailed" if not event.get("canceled"):
                self.problems.append(f"{event['errorText']} {event.get('type')}")
            case "Runtime.exceptionThrown":
                details = event["exceptionDetails"]
                thrown = details.get("exception", {}).get("description", details["text"])
                self.problems.append(str(thrown))
            case "Runtime.consoleAPICalled" if event["type"] in ("error", "warning", "assert"):
                told = [str(one.get("value", one.get("description"))) for one in event["args"]]
                self.problems.append(f"console.{event['type']}: {' '.join(told)}")
            case "Log.entryAdded" if event["entry"]["level"] in ("error", "warning"):
                self.problems.append(f"{event['entry']['text']} {event['entry'].get('url', '')}")
        return received

    def open(self, url: str) -> None:
        """Load a page, and wait until it has loaded."""
        self._loaded = False
        failed = self.call("Page.navigate", url=url).get("errorText")
        if failed:
            raise RuntimeError(f"{url}: {failed}")
        while not self._loaded:
            self._receive()

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression in the page; a promise is awaited."""
        answer = self.call(
            "Runtime.evaluate",
            expression=script,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, script: str) -> Any:
        """Return the first true value of a JavaScript expression."""
        return eventually(lambda: self.run(script))

    def type(self, text: str) -> None:
        """Type text where the focus is."""
        for key in text:
            self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=key)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def resize(self, width: int, height: int, *, phone: bool = False) -> None:
        """Give the page a size in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )

    def prefer(self, scheme: str) -> None:
        """Be a system with a light or dark scheme."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path: Path) -> None:
        """Write a picture of the visible part of the page."""
        path.parent.mkdir(parents=True, exist_ok=True)
        made = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(made["data"]))


def _address(stream: IO[str]) -> str:
    """Return the address that a starting Chromium prints."""
    printed = []
    for line in stream:
        printed.append(line)
        if found := re.search(r"listening on (ws://\S+)", line):
            return found[1]
    raise RuntimeError(f"Chromium has ended: {''.join(printed)}")
