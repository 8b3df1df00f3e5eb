"""dscache beside redis-py in one run: interleaved rounds, medians, ratios, and the limit.

``python bench/compare.py`` prints a table for people, with ``--markdown`` that of the README too.
It is a small part of ``run.py``, for a quick look at the effect of a change.
"""

from __future__ import annotations

from collections.abc import Sequence

from contest import BATCHED, SINGLE, Contest
from contestants import LIMIT
from dscache.embedded import EmbeddedServer
from machine import facts
from report import as_text, goal
from rounds import Group, Pace, Row, arguments, measure
from workload import ORDINARY, RECORDS, Work, apart

WHO = ("fast", "pure", "redis-py", "redis-py-pipelined", SINGLE, BATCHED)
TASKS = 100
BULKS = ("get_many", "set_many")
# The comparisons: their label, the operation, its tasks, and whether documents are decoded.
ROWS = (
    (f"await get, {TASKS} tasks", "get", TASKS, False),
    (f"await get, {TASKS} tasks, decoded", "get", TASKS, True),
    ("await get, 1 task", "get", 1, False),
    (f"{RECORDS} names in bulk, raw", "get_many", 1, False),
    (f"{RECORDS} names in bulk, decoded", "get_many", 1, True),
    (f"await set, {TASKS} tasks", "set", TASKS, False),
    (f"{RECORDS} records written in bulk", "set_many", 1, False),
)


def groups_of(contest: Contest) -> list[Group]:
    """Return the groups of rows. redis-py's fastest way is the last row of each group."""
    groups = []
    for title, operation, tasks, decode in ROWS:
        work = Work(operation, tasks, decode=decode)
        command = "MSET" if operation.startswith("set") else "MGET"
        one = f"redis-py, hiredis: {'one ' if operation in BULKS else ''}{command}"
        rows = [
            contest.row("fast", work, "dscache, fast core"),
            contest.row("pure", work, "dscache, pure core"),
        ]
        if operation in BULKS:
            pipeline = f"redis-py, hiredis: a pipeline of {command}"
            rows.append(contest.row("redis-py-pipelined", work, pipeline))
        groups.append(Group(title, [*rows, contest.row("redis-py", work, one)]))
    return groups


def limits_of(contest: Contest) -> list[Row]:
    """Return the rows of redis-benchmark."""
    return [contest.row(who, Work("get")) for who in (SINGLE, BATCHED)]


def limits_as_text(limits: Sequence[Row]) -> list[str]:
    found = [row for row in limits if not row.missing]
    if not found:
        return ["", f"the limit: left out, there is no {LIMIT} in PATH"]
    return ["", "the limit", *(f"  {row.label:52}{row.median:12,.0f}" for row in found)]


def goals_as_text(groups: Sequence[Group]) -> list[str]:
    """Return two ratios that show at a glance whether something has become slower."""
    get, bulk, decoded = groups[0], groups[3], groups[4]
    return [
        goal(f"{get.title}, fast core to redis-py", get.rows[0], get.rows[-1], 12),
        goal(
            f"{bulk.title}, fast core to redis-py's one MGET with decoding",
            bulk.rows[0],
            decoded.rows[-1],
            6,
        ),
    ]


def as_markdown(groups: Sequence[Group]) -> list[str]:
    """Return the README's table: thousands of records per second."""
    lines = ["", "| thousand records per second | fast | pure | redis-py | fast / redis-py |"]
    lines.append("|---|--:|--:|--:|--:|")
    for group in groups:
        fast, pure, *_, peer = (row.median for row in group.rows)
        cells = [group.title, *map(thousands, (fast, pure, peer)), f"{fast / peer:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def thousands(number: float) -> str:
    """Return a number in thousands, with at most three significant digits."""
    return f"{number / 1000:,.{0 if number >= 100_000 else 1}f}"


def main() -> None:
    parser = arguments(__doc__, rounds=7, seconds=0.3)
    parser.add_argument("--markdown", action="store_true", help="print the README's table too")
    options = parser.parse_args()
    with EmbeddedServer() as server, apart(server) as placing, Contest(server, WHO) as contest:
        contest.store(ORDINARY)
        groups, limits = groups_of(contest), limits_of(contest)
        measure([*groups, Group("", limits)], Pace(options.rounds, options.seconds))
        header = facts(server, placing, options.rounds)
    print(*header, sep="\n")
    print(*as_text(groups), *limits_as_text(limits), "", *goals_as_text(groups), sep="\n")
    if options.markdown:
        print(*as_markdown(groups), sep="\n")


if __name__ == "__main__":
    main()
