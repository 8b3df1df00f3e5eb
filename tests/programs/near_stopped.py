"""Read one record through a near cache all the time, while others stop this process.

``python -m tests.programs.near_stopped WHERE ROUNDS``; WHERE is JSON. It prints "warm" as soon as
the record is kept. Once another version is read, it prints, as JSON, when the last read of the
earlier one began, by the system's monotonic clock; then the next round begins.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from tests.support.blocking import until
from tests.support.near_truth import is_at_hand, open_cache, version_of


def main(where: dict[str, Any], rounds: int) -> None:
    with open_cache(where["options"], where["near"]) as cache:
        for _ in range(rounds):
            until(lambda: is_at_hand(cache, "a"), "a hit")
            first = version_of(cache, "a")
            last = began = time.monotonic()
            print("warm", flush=True)
            while version_of(cache, "a") == first:
                last = began
                began = time.monotonic()
            print(json.dumps(last), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]))
