# Everything is installed into .venv, which the first target that needs it creates. Required: Python
# 3.11 or newer with venv and headers, a C compiler, make. Nothing needs root.

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check

# The first Python that is new enough and complete; make PYTHON=/path/to/python3.x chooses another.
PYTHON ?= $(shell for candidate in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$candidate" -c 'import ensurepip, os, sys, sysconfig, venv; \
	header = os.path.join(sysconfig.get_path("include"), "Python.h"); \
	sys.exit(sys.version_info < (3, 11) or not os.path.exists(header))' >/dev/null 2>&1 \
	&& echo "$$candidate" && break; done)

# With it, every process that a test starts would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

CREATED := $(VENV)/.created
BUILT := $(VENV)/.built

# Two pips at once would break the environment.
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help build demo test test-minimum soak sanitize lint format docs wheel bench bench-smoke clean

help:
	@echo "make demo         the main job on a private server, with measured records per second"
	@echo "make test         the whole suite, on both backends and every server found"
	@echo "make test-minimum  the suite with the oldest dependencies that pyproject.toml allows"
	@echo "make soak         the long form of the fault tests, about an hour, with their figures"
	@echo "make sanitize     the compiled core under sanitizers: a million bad replies, no memory, finalizers"
	@echo "make lint         ruff, mypy --strict, the directions of imports, cython-lint, stubtest"
	@echo "make format       let ruff format the code"
	@echo "make bench        the benchmarks, beside the peers and the limit, into bench/results/"
	@echo "make bench-smoke  each benchmark once, hardly measured, to see that it runs"
	@echo "make docs         the site, into build/site"
	@echo "make wheel        sdist and wheel, into dist/, tried without a compiler by the whole suite"
	@echo "make build        $(VENV), with the compiled core built in place"
	@echo "make clean        remove the environments and everything built"
	@echo "ARGS='...' goes to what demo, test, soak, bench... run, such as ARGS='-k name'."

$(CREATED):
	@test -n "$(PYTHON)" || { echo "make: no Python found that is 3.11 or newer and has venv" \
		"and its headers (in Debian: python3-venv, python3-dev); install one, or name one with" \
		"make PYTHON=/path/to/python3.x" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: dscache" \
		"needs Python 3.11 or newer, and $(PYTHON) is $$("$(PYTHON)" -V 2>&1)" >&2; exit 1; }
	"$(PYTHON)" -m venv --clear $(VENV)
	$(PIP) 'setuptools>=77' 'cython>=3.1'
	@touch $@

# One stamp for each extra. The package is installed in editable mode, without the compiled core,
# which the next rule builds in place.
$(VENV)/.installed-demo: EXTRAS := embedded,uvloop
$(VENV)/.installed-%: EXTRAS = $*
$(VENV)/.installed-%: pyproject.toml $(CREATED)
	DSCACHE_NO_EXTENSIONS=1 $(PIP) --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

# Forced, because neither Cython nor setuptools notices a changed option in setup.py.
$(BUILT): setup.py $(wildcard dscache/*.pyx dscache/core/*.pxi) $(CREATED)
	CYTHON_FORCE_REGEN=1 $(PY) setup.py -q build_ext --inplace --force
	@touch $@

build: $(VENV)/.installed-demo $(BUILT)

demo: $(VENV)/.installed-demo $(BUILT)
	$(PY) examples/demo.py $(ARGS)

# conftest.py chooses the number of processes, such as three on two cores. A process that crashes
# isn't restarted, and fails the run. ARGS='-n 0' runs one process, for a debugger or -s.
BESIDE := -n auto --maxprocesses 8 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder
test: $(VENV)/.installed-test $(BUILT)
	$(PY) -m pytest -p no:benchmark $(BESIDE) $(ARGS)

# A separate environment, in which pip installs the oldest allowed versions.
MINIMUM := build/minimum.txt
$(MINIMUM): pyproject.toml tests/packaging/minimum.py
	@mkdir -p $(@D)
	"$(PYTHON)" tests/packaging/minimum.py >$@

test-minimum: $(MINIMUM)
	PIP_CONSTRAINT="$(abspath $(MINIMUM))" $(MAKE) test VENV=.venv-minimum ARGS='$(ARGS)'

soak: $(VENV)/.installed-test $(BUILT)
	$(PY) -m tests.soak $(ARGS)

# In a copy, so that the core built in place stays as it is. A report of either sanitizer ends the
# process.
SANITIZED := build/sanitized
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined
SANITIZED_RUN = cd $(SANITIZED) && PYTHONPATH=. PYTHONMALLOC=malloc \
	ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=4 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
	"$(abspath $(PY))"
sanitize: $(VENV)/.installed-test
	rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)
	cp -r dscache tests setup.py pyproject.toml README.md LICENSE $(SANITIZED)
	rm -f $(SANITIZED)/dscache/*.so
	cd $(SANITIZED) && CFLAGS='$(SANITIZERS) -g -O1' LDFLAGS='$(SANITIZERS)' \
		"$(abspath $(PY))" setup.py -q build_ext --inplace --force
	$(SANITIZED_RUN) -m tests.soak fuzz finalizers shortage $(ARGS)

lint: $(VENV)/.installed-lint $(BUILT)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --strict dscache
	"$(VENV)/bin/lint-imports" --no-cache
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cython-lint dscache/_fast.pyx dscache/core/*.pxi
	$(PY) -m mypy.stubtest dscache._fast

format: $(VENV)/.installed-lint
	$(PY) -m ruff format .

# The wheel is built from the sdist, so that both are tested.
wheel: $(VENV)/.installed-wheel
	rm -rf dist build/lib.* build/cython build/bdist.*
	$(PY) -m build -q --no-isolation
	$(PY) tests/packaging/installed.py $(BESIDE) $(ARGS)

docs: $(VENV)/.installed-docs $(BUILT)
	$(PY) -m mkdocs build -q -f docs/site/mkdocs.yml --strict

bench: $(VENV)/.installed-bench $(BUILT)
	$(PY) bench/run.py $(ARGS)

bench-smoke: $(VENV)/.installed-bench $(BUILT)
	$(PY) bench/run.py --smoke $(ARGS)

clean:
	rm -rf $(VENV) .venv-minimum build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f dscache/*.so dscache/_fast.c dscache/_fast.html
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
