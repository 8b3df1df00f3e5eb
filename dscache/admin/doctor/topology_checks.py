"""How good a cluster is for records, or what Sentinels watch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..cluster_report import ClusterReport
from .findings import BAD, OK, WARNING, Finding, number


def check_cluster(report: ClusterReport, *, is_configured: bool) -> Finding:
    """Judge the state of a cluster, and whether the configuration says that it is one."""
    primaries = sum(node.role == "primary" for node in report.nodes)
    found = (
        f"{number(len(report.nodes), 'node')}, "
        f"{primaries} {'primary' if primaries == 1 else 'primaries'}, "
        f"{report.covered} slots covered"
    )
    more = "dscache cluster shows each node"
    if report.problems:
        return Finding("cluster", BAD, "; ".join(report.problems), more)
    if not is_configured:
        return Finding(
            "cluster",
            BAD,
            f"{found}; the configuration names a single server",
            "a cache of this configuration fails with MOVED: give nodes in place of host and port",
        )
    if report.remarks:
        return Finding("cluster", WARNING, "; ".join(report.remarks), more)
    replicas = len(report.nodes) - primaries
    if not replicas:
        return Finding(
            "cluster",
            WARNING,
            f"{found}, no replicas",
            "the records of a node that is lost are lost, and its slots are served by nobody: "
            "give each primary a replica",
        )
    return Finding("cluster", OK, found)


@dataclass(frozen=True, slots=True)
class SentinelSays:
    """What one Sentinel says of its group, or why it says nothing."""

    address: str
    trouble: str = ""
    primary: str = ""
    flags: str = ""
    replicas: int = 0
    quorum: str = ""
    """Empty if enough Sentinels are there for a failover, else what it says of that."""


def check_sentinels(said: Sequence[SentinelSays]) -> Finding:
    """Judge whether the Sentinels would replace a lost primary."""
    name = "sentinels"
    well = [one for one in said if not one.trouble]
    silent = "; ".join(f"{one.address}: {one.trouble}" for one in said if one.trouble)
    if not well:
        return Finding(name, BAD, silent, "start the Sentinels, or correct their addresses")
    primaries = {one.primary for one in well}
    found = f"{len(well)} of {len(said)} answer, the primary is {well[0].primary}"
    if len(primaries) > 1:
        told = ", ".join(f"{one.address} names {one.primary}" for one in well)
        return Finding(
            name, BAD, f"they disagree: {told}", "wait a minute; then restart what is behind"
        )
    down = [one for one in well if "o_down" in one.flags or "s_down" in one.flags]
    if len(down) > len(well) // 2:
        return Finding(name, BAD, f"{found}, and is down for them", "look at the primary's log")
    if short := next((one.quorum for one in well if one.quorum), ""):
        return Finding(
            name, BAD, f"{found}; {short}", "no failover can happen: start the missing Sentinels"
        )
    if silent:
        return Finding(name, WARNING, f"{found}; {silent}", "start the missing Sentinels")
    if not well[0].replicas:
        return Finding(
            name, WARNING, f"{found}, without replicas", "there is nothing to fail over to"
        )
    if len(said) < 3:
        return Finding(
            name,
            WARNING,
            f"{found}, of {number(len(said), 'Sentinel')} configured",
            "name all of them, and run three at least: with fewer, one lost Sentinel is too many",
        )
    return Finding(name, OK, f"{found}, {number(well[0].replicas, 'replica')}")
