"""deepstream's own server and client from npm: how the tests get and run them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.support.documents import PROJECT

VERSIONS = {
    "@deepstream/cache-redis": "2.0.9",
    "@deepstream/client": "7.0.5",
    "@deepstream/clusternode-redis": "1.0.1",
    "@deepstream/protobuf": "1.0.9",
    "@deepstream/server": "7.0.2",
}
# The package is on no registry. A server with httpServer of type default doesn't use it.
_STUB = {
    "package.json": '{"name": "uWebSockets.js", "version": "20.19.0", "main": "index.js"}',
    "index.js": "module.exports = {}",
}
_FOLDER = PROJECT / "build" / "deepstream" / "-".join(VERSIONS.values())


class NotInstalledError(Exception):
    """There is no Node, or npm can't get the packages."""


def install() -> Path:
    """Return the folder that holds ``node_modules``; the first call takes ten seconds.

    Raises NotInstalledError.
    """
    if _FOLDER.exists():
        return _FOLDER
    if not (shutil.which("node") and (npm := shutil.which("npm"))):
        raise NotInstalledError("there is no Node with npm")
    try:
        _FOLDER.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=_FOLDER.parent))
    except OSError:
        folder = Path(tempfile.mkdtemp())  # the tests of a wheel may run where nothing is writable
    stub = folder / "stub"
    stub.mkdir()
    for name, text in _STUB.items():
        (stub / name).write_text(text, encoding="utf-8")
    package = {
        "private": True,
        "dependencies": VERSIONS,
        "overrides": {"uWebSockets.js": "file:./stub"},
    }
    (folder / "package.json").write_text(json.dumps(package), encoding="utf-8")
    try:
        subprocess.run(
            [npm, "install", "--ignore-scripts", "--prefer-offline", "--no-audit", "--no-fund"],
            cwd=folder,
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=240,
        )
    except (subprocess.SubprocessError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise NotInstalledError(f"npm can't get deepstream: {error}") from None
    if folder.parent != _FOLDER.parent:
        return folder
    try:
        # Several processes may install at once; each has a folder of its own until it is whole.
        os.rename(folder, _FOLDER)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
    return _FOLDER
