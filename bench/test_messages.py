"""Two message nodes that send and hear each other, beside redis-py and deepstream's connector.

A time is that of one message, from its sending until the other node has it. *raw* leaves its data
as text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from clients.messages import WINDOW
from clients.work import Work
from contest import Row, contest, rows
from contestants import DEEPSTREAM

NODES = ("fast-node", "pure-node")
TASKS = Work("messages", 100)
ON_THEIR_WAY = Work("messages", 1)


def sending(others: tuple[str, ...], work: Work) -> list[Row]:
    return [
        *rows(NODES, work),
        *rows(NODES, replace(work, decode=False), "raw"),
        *rows(others, work),
    ]


@contest({"messages: 100 tasks": sending(("redis-py-node",), TASKS)})
def test_tasks(race: Any, row: Row) -> None:
    race(row)


@contest({f"messages: {WINDOW:,} on their way": sending((DEEPSTREAM,), ON_THEIR_WAY)})
def test_window(race: Any, row: Row) -> None:
    race(row)
