"""The findings of a checkup, each with a verdict and advice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

OK, UNKNOWN, WARNING, BAD = "ok", "unknown", "warning", "bad"
VERDICTS = (OK, UNKNOWN, WARNING, BAD)
"""The verdicts from the best to the worst.

A check the server won't answer counts as unknown and doesn't lower the verdict of the checkup.
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    check: str
    verdict: str
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """The name of a check; each method returns a finding of it with that verdict."""

    name: str

    def ok(self, found: str) -> Finding:
        return Finding(self.name, OK, found)

    def unknown(self, found: str, advice: str) -> Finding:
        return Finding(self.name, UNKNOWN, found, advice)

    def warning(self, found: str, advice: str) -> Finding:
        return Finding(self.name, WARNING, found, advice)

    def bad(self, found: str, advice: str) -> Finding:
        return Finding(self.name, BAD, found, advice)


@dataclass(frozen=True, slots=True)
class Checkup:
    """All findings on one Redis."""

    address: str
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> str:
        """The worst verdict of all."""
        return worst(one.verdict for one in self.findings)

    @property
    def status(self) -> int:
        """The exit status of the command: 0 if all is well, 1 for warnings, 2 for bad findings."""
        return {OK: 0, UNKNOWN: 0, WARNING: 1, BAD: 2}[self.verdict]

    def count(self, verdict: str) -> int:
        """Return the number of findings with a verdict."""
        return sum(one.verdict == verdict for one in self.findings)


def worst(verdicts: Iterable[str]) -> str:
    """Return the worst verdict; OK if there is none."""
    return max(verdicts, key=VERDICTS.index, default=OK)


def merged(by_node: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """Return the findings on several nodes as one list, with the worst verdict of each check."""
    checks: dict[str, list[tuple[str, Finding]]] = {}
    for address, findings in by_node.items():
        for one in findings:
            checks.setdefault(one.check, []).append((address, one))
    result = []
    for found in checks.values():
        verdict = worst(one.verdict for _, one in found)
        worst_of = [(address, one) for address, one in found if one.verdict == verdict]
        if len({one.found for _, one in found}) == 1:
            result.append(found[0][1])
            continue
        texts = "; ".join(f"{address}: {one.found}" for address, one in worst_of)
        result.append(replace(worst_of[0][1], found=texts))
    return result


def number(count: int, noun: str) -> str:
    """Return a count and the noun for it, such as ``2 replicas``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
