"""``python -m dscache``: the command line."""

from ._start import CommandImports

with CommandImports():
    from .cli import main

if __name__ == "__main__":
    main()
