"""Build ``dscache._fast``, the one compiled module; everything else is in pyproject.toml.

``DSCACHE_NO_EXTENSIONS=1`` builds the pure-Python package. Without it a failed build is an error,
because silently installing the slow core would be worse.
"""

import os

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PURE = os.environ.get("DSCACHE_NO_EXTENSIONS", "") not in ("", "0")
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


def compiled_modules():
    """Return the extensions to build: none if DSCACHE_NO_EXTENSIONS is set."""
    if PURE:
        return []
    try:
        from Cython.Build import cythonize

        # The compiler takes the last -O, which would override the user's CFLAGS.
        optimise = [] if "-O" in os.environ.get("CFLAGS", "") else ["-O3"]
        fast = Extension("dscache._fast", ["dscache/_fast.pyx"], extra_compile_args=optimise)
        return cythonize([fast], build_dir="build/cython", language_level=3)
    except Exception as error:
        raise SystemExit(REMEDY.format(error=error)) from error


setup(ext_modules=compiled_modules(), cmdclass={"build_ext": LoudBuild})
