"""What a look at a Redis found: each of it with how good that is, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

OK, UNKNOWN, WARNING, BAD = "ok", "unknown", "warning", "bad"
# From the best to the worst. Who isn't told what can't be known is no worse off for it.
VERDICTS = (OK, UNKNOWN, WARNING, BAD)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    check: str
    verdict: str
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Checkup:
    """All that was found of one Redis."""

    address: str
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> str:
        """The worst verdict of all."""
        return worst(one.verdict for one in self.findings)

    @property
    def status(self) -> int:
        """What a script gets as exit status: 0 if all is well, 1 for warnings, 2 if it is bad."""
        return {OK: 0, UNKNOWN: 0, WARNING: 1, BAD: 2}[self.verdict]

    def count(self, verdict: str) -> int:
        """Return how many findings have a verdict."""
        return sum(one.verdict == verdict for one in self.findings)


def worst(verdicts: Iterable[str]) -> str:
    """Return the worst of some verdicts."""
    return max(verdicts, key=VERDICTS.index, default=OK)


def merged(by_node: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """Return what was found of several nodes as what was found of all: of each check the worst."""
    checks: dict[str, list[tuple[str, Finding]]] = {}
    for address, findings in by_node.items():
        for one in findings:
            checks.setdefault(one.check, []).append((address, one))
    result = []
    for found in checks.values():
        verdict = worst(one.verdict for _, one in found)
        those = [(address, one) for address, one in found if one.verdict == verdict]
        if len({one.found for _, one in found}) == 1:
            result.append(found[0][1])
            continue
        texts = "; ".join(f"{address}: {one.found}" for address, one in those)
        result.append(replace(those[0][1], found=texts))
    return result


def number(count: int, noun: str) -> str:
    """Return a count and the noun for it, such as ``2 replicas``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
