"""Build ``dscache._fast``, the one compiled module; everything else is in pyproject.toml.

``DSCACHE_NO_EXTENSIONS=1`` builds the pure-Python package. Without it a failed build is an error,
because silently installing the slow core would be worse. ``DSCACHE_REPOSITORY`` is the address of
the repository, which a release names in its metadata.
"""

import json
import os
import re
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

PURE = os.environ.get("DSCACHE_NO_EXTENSIONS", "") not in ("", "0")
REPOSITORY = os.environ.get("DSCACHE_REPOSITORY", "").rstrip("/")
REMEDY = (
    "dscache: the compiled core (dscache._fast) could not be built: {error}\n"
    "It needs a C compiler and the headers of this Python (such as the Debian packages gcc and "
    "python3-dev).\n"
    "To build without it, several times slower, set DSCACHE_NO_EXTENSIONS=1."
)


class LoudBuild(build_ext):
    """Build the extension, or stop with the reason and the remedy."""

    def run(self):
        try:
            super().run()
        except Exception as error:
            raise SystemExit(REMEDY.format(error=error)) from error


class DescribedWheel(bdist_wheel):
    """Build the wheel with a software bill of materials beside its metadata (PEP 770)."""

    def egg2dist(self, egginfo_path, distinfo_path):
        super().egg2dist(egginfo_path, distinfo_path)
        folder = os.path.join(distinfo_path, "sboms")
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "dscache.cdx.json"), "w", encoding="utf-8") as file:
            json.dump(materials(self.distribution.metadata), file, indent=2)


def materials(metadata):
    """Return the contents of the wheel, as CycloneDX.

    It contains no other library: hiredis, msgspec, PyYAML and redis are installed beside it. The
    compiled core has code that Cython adds to each module.
    """
    own = component("library", metadata.get_name(), metadata.get_version(), "Apache-2.0")
    parts = []
    if not PURE:
        from Cython import __version__ as version

        parts.append(component("library", "Cython", version, "Apache-2.0"))
    refs = [part["bom-ref"] for part in parts]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": own},
        "components": parts,
        "dependencies": [
            {"ref": own["bom-ref"], "dependsOn": refs},
            *({"ref": ref} for ref in refs),
        ],
        "compositions": [{"aggregate": "complete", "assemblies": [own["bom-ref"]]}],
    }


def component(kind, name, version, license_id):
    url = f"pkg:pypi/{name.lower()}@{version}"
    licenses = [{"license": {"id": license_id}}]
    known = {"type": kind, "name": name, "version": version, "purl": url}
    return {"bom-ref": url, **known, "licenses": licenses}


def compiled_modules():
    """Return the extensions to build: none if DSCACHE_NO_EXTENSIONS is set."""
    if PURE:
        return []
    try:
        from Cython.Build import cythonize

        # The compiler takes the last -O, which would override the user's CFLAGS.
        optimise = [] if "-O" in os.environ.get("CFLAGS", "") else ["-O3"]
        fast = Extension("dscache._fast", ["dscache/_fast.pyx"], extra_compile_args=optimise)
        # The core imports hiredis, which needs the GIL, only where that is on. Python 3.13's own
        # containers aren't yet as safe without it as the caches need them.
        is_free = sys.version_info >= (3, 14)
        directives = {"language_level": 3, "freethreading_compatible": is_free}
        return cythonize([fast], build_dir="build/cython", compiler_directives=directives)
    except Exception as error:
        raise SystemExit(REMEDY.format(error=error)) from error


def readme():
    """Return the README; its links lead to the release's files, as a package has no others."""
    text = Path("README.md").read_text(encoding="utf-8")
    if not REPOSITORY:
        return text
    of_file = re.compile(r"(!?)(\[[^\]]*\])\(((?:docs|examples)/[^)]*|[A-Z]+(?:\.md)?)\)")
    return of_file.sub(lambda one: f"{one[1]}{one[2]}({url_of(one[3], bool(one[1]))})", text)


def urls():
    """Return the project's addresses, by the names that package indexes know."""
    if not REPOSITORY:
        return {}
    return {
        "Source": REPOSITORY,
        "Documentation": url_of("docs/"),
        "Changelog": url_of("CHANGELOG.md"),
        "Issues": f"{REPOSITORY}/issues",
        "Security": url_of("SECURITY.md"),
    }


def url_of(path, is_image=False):
    (version,) = re.findall('__version__ = "(.+)"', Path("dscache/_version.py").read_text())
    shown = "raw" if is_image else "tree" if path.endswith("/") else "blob"
    return f"{REPOSITORY}/{shown}/v{version}/{path}"


setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    project_urls=urls(),
    ext_modules=compiled_modules(),
    cmdclass={"build_ext": LoudBuild, "bdist_wheel": DescribedWheel},
)
