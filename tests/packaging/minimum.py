"""Print the oldest versions that pyproject.toml allows, as constraints for pip.

``make test-minimum`` installs them, so that a bound that no longer works fails there. The tools of
the tests are left out: no program that uses dscache installs them.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
# The extras that a program installs to use dscache.
EXTRAS = ("cli", "django", "embedded", "key-value", "otel", "prometheus", "uvloop")
_LOWEST = re.compile(r"(?P<name>[A-Za-z0-9._-]+)>=(?P<version>[0-9.]+)")


def constraints(project: Path = PROJECT) -> Iterator[str]:
    """Yield ``name==version`` for each dependency of the package and of its extras.

    Raises ValueError for one that declares no lowest version.
    """
    declared = tomllib.loads(project.read_text())["project"]
    extras = declared["optional-dependencies"]
    of_extras = (one for extra in EXTRAS for one in extras.get(extra, ()))
    for wanted in (*declared["dependencies"], *of_extras):
        found = _LOWEST.match(wanted)
        if found is None:
            raise ValueError(f"{project}: {wanted!r} must begin with name>=version")
        yield f"{found['name']}=={found['version']}"


if __name__ == "__main__":
    print("\n".join(constraints()))
