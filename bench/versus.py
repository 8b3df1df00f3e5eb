"""dscache beside its peers and beside the limit: the same work on the same server, interleaved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chart import Bar, Panel, bars
from contest import ALONE, BATCHED, DEEPSTREAM, OURS, SINGLE, Contest, label_of
from report import Section, Table, in_groups, ratio
from rounds import Group, Pace, Row, measure
from workload import RECORDS, Work

TASKS = 100
MANY_TASKS = 1000
ONE_MGET = ("redis-py", "redis-py-blocking")
LOOPS = ("fast", "fast-asyncio", "pure")
TITLES = {
    "alone": "await get, one after the other",
    "get": f"await get, {TASKS} tasks",
    "many": f"await get, {MANY_TASKS} tasks",
    "set": f"await set, {TASKS} tasks",
    "bulk": f"get_bulk, {RECORDS} records",
    "write": f"set_bulk, {RECORDS} records",
}
TEXT = """\
A read is both keys of a record, and a write too. All decode each document, Python's clients by
msgspec, except in the rows called *raw*, where it stays the text that it is. *client µs* and
*server µs* are microseconds of processor time a record."""


def groups_of(contest: Contest) -> dict[str, Group]:
    """Return the groups of rows, in the order of the report."""

    def one(who: str, operation: str, tasks: int = 1) -> Row:
        return contest.row(who, Work(operation, tasks))

    def raw(who: str, operation: str, tasks: int = 1) -> Row:
        work = Work(operation, tasks, decode=False)
        return contest.row(who, work, f"{contest.label(who)}, raw")

    blocking = ("blocking", "blocking-pure")
    others = ("coredis", "glide", "aiocache", DEEPSTREAM)
    pipelined = ("redis-py-pipelined", "redis-py-blocking-pipelined")
    concurrent = (*LOOPS, "redis-py", *others)
    alone = (*LOOPS, *blocking, "redis-py", "redis-py-blocking", "glide-blocking", *others, ALONE)
    bulk = (*LOOPS, *blocking, *ONE_MGET, *pipelined, "glide-blocking", *others)

    def rows(names: Sequence[str], operation: str, tasks: int = 1) -> list[Row]:
        made = []
        for name in names:
            if name in OURS and operation.startswith("get"):
                made.append(raw(name, operation, tasks))
            made.append(one(name, operation, tasks))
        return made

    groups = {
        "alone": rows(alone, "get"),
        "get": rows(concurrent, "get", TASKS),
        "many": rows((*concurrent, SINGLE), "get", MANY_TASKS),
        "set": rows(concurrent, "set", TASKS),
        "bulk": rows((*bulk, BATCHED), "get_many"),
        "write": rows(bulk, "set_many"),
    }
    base = contest.label("redis-py")
    return {name: Group(TITLES[name], some, base) for name, some in groups.items()}


@dataclass
class Goal:
    """A ratio that dscache is meant to reach on any machine."""

    group: str
    against: str
    at_least: float
    who: str = "fast"
    decode: bool | None = None
    """Whether the goal is for decoded documents; None for any, which the raw row decides."""
    against_group: str = ""

    def row(self, groups: dict[str, Group]) -> list[str]:
        """Return the goal, the measurement, and whether it is enough."""
        ours = _find(groups[self.group], self.who, decode=bool(self.decode))
        also = None if self.decode is not None else _find(groups[self.group], self.who, decode=True)
        peer = _find(groups[self.group], self.against, decode=True)
        assert ours is not None
        what = groups[self.group].title
        if self.group == "bulk":
            what += ", all .data read" if self.decode else ", raw"
        if self.who == "pure":
            what = f"pure core, {what}"
        asked = f"{self.at_least:g} x"
        if peer is None or peer.missing:
            why = peer.missing if peer else "it is not there"
            return [what, label_of(self.against), asked, "-", "-", f"not measured: {why}"]
        got = ours.median / peer.median
        decoded = ratio(also.median / peer.median) if also not in (None, ours) and also else ""
        return [
            what,
            peer.label,
            asked,
            ratio(got),
            decoded,
            "holds" if got >= self.at_least else "MISSED",
        ]


GOALS = (
    Goal("get", "redis-py", 20),
    Goal("get", "glide", 12),
    Goal("get", DEEPSTREAM, 3.5),
    Goal("many", SINGLE, 0.5),
    Goal("bulk", "redis-py", 9, decode=False),
    Goal("bulk", DEEPSTREAM, 12, decode=False),
    Goal("bulk", BATCHED, 0.55, decode=False),
    Goal("bulk", "redis-py", 3, decode=True),
    Goal("set", "redis-py", 15),
    Goal("set", "glide", 9),
    Goal("write", "redis-py-pipelined", 10),
    Goal("alone", "redis-py", 1.3),
    Goal("get", "redis-py", 4, who="pure"),
)
GOALS_HEADER = ("", "against", "asked", "measured", "with .data read", "")


def _find(group: Group, who: str, *, decode: bool) -> Row | None:
    """Return the row of a contestant; if it has only one, that one."""
    rows = [row for row in group.rows if row.facts["who"] == who]
    fitting = [row for row in rows if row.facts["work"]["decode"] is decode]
    return (fitting or rows or [None])[0]


def goals_table(groups: dict[str, Group], more: Sequence[Sequence[str]] = ()) -> Table:
    """Return which goals are reached."""
    rows = [*(goal.row(groups) for goal in GOALS), *more]
    return Table("", GOALS_HEADER, rows, words=True)


def compare(contest: Contest, pace: Pace) -> tuple[Section, dict[str, Group]]:
    """Measure all of it; return the section, and its groups by name."""
    groups = groups_of(contest)
    measure(list(groups.values()), pace)
    section = Section("peers", "Peers", TEXT, in_groups(list(groups.values())))
    section.charts["peers.svg"] = _chart(groups)
    section.raw = [group.as_json() for group in groups.values()]
    return section, groups


def _chart(groups: dict[str, Group]) -> str:
    panels = []
    for group in groups.values():
        shown = [
            Bar(row.label.partition(" -c")[0], row.median, _colour(row))
            for row in group.measured
            # The chart would be twice as high without saying more.
            if row.facts["who"] not in ("fast-asyncio", "blocking-pure")
        ]
        panels.append(Panel(group.title, shown))
    return bars(
        "Records per second, client and server on a core each",
        "records per second",
        panels,
        {"dscache": "ours", "dscache, pure core": "twin", "others": "peer", "the limit": "limit"},
    )


def _colour(row: Row) -> str:
    who = row.facts["who"]
    if who.startswith("limit"):
        return "limit"
    if who not in OURS:
        return "peer"
    return "twin" if "pure" in who else "ours"
