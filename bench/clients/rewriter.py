"""Rewrite a hundredth of the records each second: ``python -m clients.rewriter HOST PORT``."""

from __future__ import annotations

import random
import sys
import time
from typing import Any

import redis

from clients.work import DOCUMENT, ORDINARY, VERSION, encode, names_of

MANY = 100_000
REWRITTEN = 0.01
TURNS = 100  # a second


def main(host: str, port: str) -> None:
    names, version = names_of(ORDINARY, MANY), VERSION
    text = encode(DOCUMENT)
    with redis.Redis(host, int(port)) as client:
        at = time.monotonic()
        while True:
            version += 1
            pairs: dict[str, Any] = {}
            for name in random.sample(names, round(MANY * REWRITTEN / TURNS)):
                pairs[name + "_v"], pairs[name + "_d"] = version, text
            client.mset(pairs)
            at += 1 / TURNS
            time.sleep(max(0.0, at - time.monotonic()))


if __name__ == "__main__":
    main(*sys.argv[1:])
