"""Read records once through the near cache of a blocking cache, and sleep.

``python -m tests.programs.near_sleep WHERE`` is started by a soak row; WHERE is JSON. It prints
"warm", waits for a line, and prints what it has heard of meanwhile as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.support.blocking import until
from tests.support.near_truth import counters, open_cache


def main(where: dict[str, Any]) -> None:
    names = where["names"]
    with open_cache(where["options"], where["near"]) as cache:
        cache.get_bulk(names)
        print("warm", flush=True)
        sys.stdin.readline()
        # The last changes may still be on their way.
        until(lambda: counters(cache)["invalidations"] >= len(names))
        last = max(cache.head_bulk(names).values())
        print(json.dumps({"last": last, "invalidations": counters(cache)["invalidations"]}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
