"""The growth of a record's cost: with the records of a bulk, and with the connections."""

from __future__ import annotations

from dataclasses import replace

from chart import Line, Plot, lines
from contest import Contest
from report import Section, Table
from rounds import Group, Pace, Row, measure
from workload import KINDS, ORDINARY, Work

WHO = ("fast", "pure", "redis-py")
BULKS = tuple(10**exponent for exponent in range(7))
CONNECTIONS = (1, 2, 4, 8, 16, 32, 64)
TASKS_A_CONNECTION = 100
# Thousands of tasks have done little in the usual time.
LONGER = 4
# A bulk that takes seconds is repeated less often.
LARGE = 100_000
SMOKE_BULKS, SMOKE_CONNECTIONS = BULKS[:4], CONNECTIONS[:3]
TEXT = """\
What is wanted is a cost that stays flat. A small bulk costs a round trip, whatever is in it. With
the connections grow the tasks, and Python's garbage collector looks at what each of them holds: a
row without it shows how much that is. The rest is memory beyond the processor's caches."""


def run(contest: Contest, pace: Pace) -> Section:
    """Measure both, and draw them."""
    bulks = SMOKE_BULKS if pace.smoke else BULKS
    connections = SMOKE_CONNECTIONS if pace.smoke else CONNECTIONS
    contest.store(ORDINARY, count=max(KINDS[ORDINARY].stored, *bulks))
    reads = _bulk(contest, "get_many", bulks)
    writes = _bulk(contest, "set_many", bulks)
    spread = _connections(contest, connections)
    small, large = [], []
    for group in (*reads, *writes):
        size = group.rows[0].facts["work"]["size"]
        (large if size >= LARGE else small).append(group)
    measure(small, pace)
    measure(spread, Pace(pace.rounds, LONGER * pace.seconds, smoke=pace.smoke))
    measure(large, Pace(min(pace.rounds, 3), pace.seconds, warm=1))
    section = Section("growth", "Growth", TEXT)
    section.tables = [
        _table("Microseconds a record, by the records of a get_bulk", reads, bulks),
        _table("Microseconds a record, by the records of a set_bulk", writes, bulks),
        _table(
            "Microseconds a record, by the connections: get, 100 tasks on each",
            spread,
            connections,
        ),
    ]
    plots = [
        Plot("get_bulk", "records of a bulk", "µs a record", _lines(reads, bulks)),
        Plot("set_bulk", "records of a bulk", "µs a record", _lines(writes, bulks)),
        Plot(
            f"get, {TASKS_A_CONNECTION} tasks on each connection",
            "connections, each of an AsyncCache of its own",
            "µs a record",
            _lines(spread, connections),
            from_zero=True,
        ),
        Plot(
            "the same, processor time of the client",
            "connections, each of an AsyncCache of its own",
            "µs a record",
            _lines(spread, connections, "cpu"),
            from_zero=True,
        ),
    ]
    section.charts["growth.svg"] = lines("Cost of a record, as more of them are handled", plots)
    groups = [*reads, *writes, *spread]
    section.raw = [group.as_json() for group in groups]
    return section


def _bulk(contest: Contest, operation: str, sizes: tuple[int, ...]) -> list[Group]:
    """Return a group of rows for each size."""
    groups = []
    for size in sizes:
        rows = []
        for who in WHO:
            work = Work(operation, size=size, decode=False)
            rows.append(contest.row(who, work))
        if operation == "get_many":
            work = Work(operation, size=size)
            rows.append(contest.row("fast", work, f"{contest.label('fast')}, decoded"))
        groups.append(Group(f"{operation} {size}", rows))
    return groups


def _connections(contest: Contest, numbers: tuple[int, ...]) -> list[Group]:
    groups = []
    for number in numbers:
        rows = []
        work = Work("get", TASKS_A_CONNECTION * number, decode=False, connections=number)
        rows += [contest.row(who, work) for who in ("fast", "pure")]
        label = f"{contest.label('fast')}, no garbage collection"
        rows.append(contest.row("fast", replace(work, collects=False), label))
        groups.append(Group(f"{number} connections", rows))
    return groups


def _each(row: Row, what: str) -> float | None:
    if row.missing:
        return None
    each = row.each(what)
    return None if each is None else each * 1e6


def _lines(groups: list[Group], xs: tuple[int, ...], what: str = "seconds") -> list[Line]:
    made = []
    for number, row in enumerate(groups[0].rows):
        costs = [_each(group.rows[number], what) for group in groups]
        points = [(float(x), cost) for x, cost in zip(xs, costs, strict=True) if cost is not None]
        made.append(Line(row.label, points))
    return made


def _table(title: str, groups: list[Group], xs: tuple[int, ...]) -> Table:
    rows = []
    for number, row in enumerate(groups[0].rows):
        costs = [_each(group.rows[number], "seconds") for group in groups]
        rows.append([row.label, *("-" if cost is None else f"{cost:,.2f}" for cost in costs)])
    return Table(title, ["", *(f"{x:,}" for x in xs)], rows)
