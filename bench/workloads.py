"""Loads other than those of the comparison: more tasks, other bulks, documents and writes."""

from __future__ import annotations

from contest import Contest
from report import Section, in_groups
from rounds import Group, Pace, measure
from workload import KINDS, ORDINARY, SIZES, WRITTEN, Work

TASKS = (1, 10, 100, 1000, 10_000)
BULKS = (10, 100, 1000, 100_000)
TTL = 3600
# A redis-py pool opens a connection for each task.
MOST_CONNECTIONS = 1000
WHO = ("fast", "pure", "redis-py")
TEXT = """\
dscache beside redis-py's asyncio client, on uvloop. Reads leave the document as text, which is
what a server does that passes it on, except in the rows called *decoded*. redis-py writes with a
ttl in a transaction of SET EX, and has nothing like `if_newer` but a script of one's own."""


def groups_of(contest: Contest, smoke: bool) -> list[Group]:
    """Return the groups of rows, in the order of the report."""
    # Work that takes seconds even when it is done only once.
    some_tasks, some_bulks = (TASKS[:3], BULKS[:3]) if smoke else (TASKS, BULKS)
    base = contest.label("redis-py")

    def group(title: str, *works: Work, who: tuple[str, ...] = WHO) -> Group:
        rows = []
        for work in works:
            for name in who:
                decoded = ", decoded" if work.decode and not _writes(work) else ""
                rows.append(contest.row(name, work, f"{contest.label(name)}{decoded}"))
        return Group(title, rows, base if "redis-py" in who else contest.label("pure"))

    def reading(operation: str, tasks: int = 1, **more: object) -> Work:
        return Work(operation, tasks, decode=False, **more)  # type: ignore[arg-type]

    groups = []
    for operation, title in (
        ("get", "await get, {}"),
        ("set", "await set, {}"),
    ):
        for tasks in some_tasks:
            of = "one after the other" if tasks == 1 else f"{tasks:,} tasks"
            made = group(title.format(of), reading(operation, tasks))
            if tasks > MOST_CONNECTIONS:
                made.rows[-1].missing = f"it opens a connection for each of {tasks:,} tasks"
            groups.append(made)
    groups += [
        group("90 % get, 10 % set, 100 tasks", reading("mixed", 100)),
        group("await get, 100 tasks, some names wanted more (Zipf 0.99)", reading("zipf", 100)),
    ]
    groups += [
        group(f"get_bulk, {size:,} records", reading("get_many", size=size)) for size in some_bulks
    ]
    groups += [
        group(f"set_bulk, {size:,} records", reading("set_many", size=size)) for size in some_bulks
    ]
    many = 10 if smoke else 100
    for kind in SIZES:
        groups += [
            group(
                f"await get, 100 tasks, documents of {kind}",
                reading("get", 100, kind=kind),
                Work("get", 100, kind=kind),
            ),
            group(f"await set, 100 tasks, documents of {kind}", reading("set", 100, kind=kind)),
            group(
                f"get_bulk, {many} records, documents of {kind}",
                reading("get_many", size=many, kind=kind),
                Work("get_many", size=many, kind=kind),
            ),
        ]
    ours = ("fast", "pure")
    groups += [
        group("await set with ttl, 100 tasks", reading("set", 100, kind=WRITTEN, ttl=TTL)),
        group(
            "await set with if_newer, 100 tasks",
            reading("set", 100, kind=WRITTEN, if_newer=True),
            who=ours,
        ),
        group("set_bulk with ttl, 1,000 records", reading("set_many", kind=WRITTEN, ttl=TTL)),
        group(
            "set_bulk with if_newer, 1,000 records",
            reading("set_many", kind=WRITTEN, if_newer=True),
            who=ours,
        ),
    ]
    return groups


def run(contest: Contest, pace: Pace) -> Section:
    """Measure all of it."""
    contest.store(*KINDS)
    if not pace.smoke:
        contest.store(ORDINARY, count=max(BULKS))
    groups = groups_of(contest, pace.smoke)
    measure(groups, pace)
    section = Section("workloads", "Workloads", TEXT, in_groups(groups))
    section.raw = [group.as_json() for group in groups]
    return section


def _writes(work: Work) -> bool:
    return work.operation in ("set", "set_many")
