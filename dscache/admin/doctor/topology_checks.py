"""Checks of a cluster, and of Sentinels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..cluster_report import ClusterReport
from .findings import Check, Finding, number


def check_cluster(report: ClusterReport, *, is_configured: bool) -> Finding:
    """Check the state of a cluster, and that the configuration names its nodes."""
    check = Check("cluster")
    primaries = sum(node.role == "primary" for node in report.nodes)
    found = (
        f"{number(len(report.nodes), 'node')}, "
        f"{primaries} {'primary' if primaries == 1 else 'primaries'}, "
        f"{report.covered} slots covered"
    )
    more = "see each node with dscache cluster"
    if report.problems:
        return check.bad("; ".join(report.problems), more)
    if not is_configured:
        return check.bad(
            f"{found}; the configuration names a single server",
            "a cache configured like this fails with MOVED: give nodes in place of host and port",
        )
    if report.remarks:
        return check.warning("; ".join(report.remarks), more)
    replicas = len(report.nodes) - primaries
    if not replicas:
        return check.warning(
            f"{found}, no replicas",
            "if a primary is lost, so are its records, and no node serves its slots: give each "
            "primary a replica",
        )
    return check.ok(found)


@dataclass(frozen=True, slots=True)
class SentinelReport:
    """One Sentinel's view of its group, or in ``trouble`` the reason that it gives none."""

    address: str
    trouble: str = ""
    primary: str = ""
    flags: str = ""
    replicas: int = 0
    quorum: str = ""
    """The error of SENTINEL CKQUORUM; empty if a failover is possible."""


def check_sentinels(reports: Sequence[SentinelReport]) -> Finding:
    """Check that the Sentinels would replace a lost primary."""
    check = Check("sentinels")
    well = [one for one in reports if not one.trouble]
    silent = "; ".join(f"{one.address}: {one.trouble}" for one in reports if one.trouble)
    if not well:
        return check.bad(silent, "start the Sentinels, or correct their addresses")
    primaries = {one.primary for one in well}
    found = f"{len(well)} of {len(reports)} answer, the primary is {well[0].primary}"
    if len(primaries) > 1:
        views = ", ".join(f"{one.address} names {one.primary}" for one in well)
        return check.bad(
            f"they disagree: {views}", "wait a minute; then restart the Sentinels with the old view"
        )
    down = [one for one in well if "o_down" in one.flags or "s_down" in one.flags]
    if len(down) > len(well) // 2:
        return check.bad(f"{found}, and they consider it down", "check the primary's log")
    if short := next((one.quorum for one in well if one.quorum), ""):
        return check.bad(
            f"{found}; {short}", "no failover is possible: start the missing Sentinels"
        )
    if silent:
        return check.warning(f"{found}; {silent}", "start the missing Sentinels")
    if not well[0].replicas:
        return check.warning(
            f"{found}, without replicas", "add a replica: without one there is no failover"
        )
    if len(reports) < 3:
        return check.warning(
            f"{found}, of {number(len(reports), 'Sentinel')} configured",
            "run at least three and name them all: with fewer, the loss of one prevents failovers",
        )
    return check.ok(f"{found}, {number(well[0].replicas, 'replica')}")
