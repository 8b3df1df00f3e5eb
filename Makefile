# Each target installs its tools into .venv. The machine needs Python 3.11 or newer with venv and
# headers, a C compiler and make. Nothing needs root.

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check

# The first Python with a sufficient version, venv and headers; PYTHON=/path/to/python3.x chooses one.
PYTHON ?= $(shell for candidate in python3 python3.15 python3.14 python3.13 python3.12 python3.11; do \
	"$$candidate" -c 'import ensurepip, os, sys, sysconfig, venv; \
	header = os.path.join(sysconfig.get_path("include"), "Python.h"); \
	sys.exit(sys.version_info < (3, 11) or not os.path.exists(header))' >/dev/null 2>&1 \
	&& echo "$$candidate" && break; done)

# With it set, every process that a test starts would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

CREATED := $(VENV)/.created
BUILT := $(VENV)/.built

# Two pips at a time would break their environment.
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help build demo test test-minimum coverage soak sanitize lint format docs docs-test wheel bench bench-smoke instructions clean

help:
	@echo "make demo         the main job on a private server, with records per second"
	@echo "make test         the whole suite, on both cores and every server found"
	@echo "make test-minimum the suite with the oldest dependencies that pyproject.toml allows"
	@echo "make coverage     the share of lines that the tests run, compiled core included"
	@echo "make soak         the long form of the fault tests, about an hour, with figures"
	@echo "make sanitize     the compiled core under sanitizers: a million bad replies, no memory, finalizers"
	@echo "make lint         ruff, mypy --strict, import directions, cython-lint, stubtest"
	@echo "make format       ruff format"
	@echo "make bench        the benchmarks, with other libraries and the limit, into bench/results/"
	@echo "make bench-smoke  each benchmark once, to see that it runs"
	@echo "make instructions the instructions of the hottest paths, against bench/instructions.json"
	@echo "make docs         the site, into build/site"
	@echo "make docs-test    the site in a headless Chromium: links, search, phone; pictures in build/screenshots"
	@echo "make wheel        sdist and wheel, into dist/; runs the suite on the wheel, without a compiler"
	@echo "make build        $(VENV), with the compiled core built in place"
	@echo "make clean        remove the environments and everything built"
	@echo "ARGS='...' passes arguments to demo, test, coverage, soak, bench...: ARGS='-k name'"

$(CREATED):
	@test -n "$(PYTHON)" || { echo "make: found no Python 3.11 or newer with venv and headers" \
		"(in Debian: python3-venv, python3-dev); install one, or choose one with" \
		"make PYTHON=/path/to/python3.x" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: dscache" \
		"needs Python 3.11 or newer, and $(PYTHON) is $$("$(PYTHON)" -V 2>&1)" >&2; exit 1; }
	"$(PYTHON)" -m venv --clear $(VENV)
	$(PIP) 'setuptools>=77' 'cython>=3.1'
	@touch $@

# One stamp per extra. The package is installed as a link to this folder and without the compiled
# core, which the next rule builds in place.
$(VENV)/.installed-demo: EXTRAS := embedded,uvloop
$(VENV)/.installed-%: EXTRAS = $*
$(VENV)/.installed-%: pyproject.toml $(CREATED)
	DSCACHE_NO_EXTENSIONS=1 $(PIP) --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

# Forced, since neither Cython nor setuptools notices a changed option in setup.py.
$(BUILT): setup.py $(wildcard dscache/*.pyx dscache/core/*.pxi) $(CREATED)
	CYTHON_FORCE_REGEN=1 $(PY) setup.py -q build_ext --inplace --force
	@touch $@

build: $(VENV)/.installed-demo $(BUILT)

demo: $(VENV)/.installed-demo $(BUILT)
	$(PY) examples/demo.py $(ARGS)

# conftest.py chooses the number of processes, three on two cores. A process that crashes isn't
# restarted and fails the run. ARGS='-n 0' runs everything in one, where a debugger and -s work.
# The tests of proxies need twemproxy. Where apt-get has it, it is unpacked, not installed; elsewhere
# those tests are skipped, and the report's header says so.
TWEMPROXY := $(VENV)/.twemproxy
$(TWEMPROXY): $(CREATED)
	@rm -rf $(VENV)/twemproxy && mkdir -p $(VENV)/twemproxy
	-@cd $(VENV)/twemproxy && command -v apt-get >/dev/null && apt-get download -qq nutcracker \
		&& dpkg-deb -x nutcracker_*.deb . || echo "make: no twemproxy, so its tests are skipped"
	@touch $@

# The same for Prometheus, which the tests let scrape caches, and its promtool.
PROMETHEUS := $(VENV)/.prometheus
$(PROMETHEUS): $(CREATED)
	@rm -rf $(VENV)/prometheus && mkdir -p $(VENV)/prometheus
	-@cd $(VENV)/prometheus && command -v apt-get >/dev/null && apt-get download -qq prometheus \
		&& dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x ./usr/bin \
		&& rm prometheus_*.deb || echo "make: no Prometheus, so its tests are skipped"
	@touch $@

# Django's own tests of caches are in its sdist alone.
DJANGO_TESTS := $(VENV)/.django-tests
$(DJANGO_TESTS): $(VENV)/.installed-test
	@rm -rf $(VENV)/django-tests && mkdir -p $(VENV)/django-tests
	-@version=$$($(PY) -c 'import django; print(django.__version__)') && cd $(VENV)/django-tests \
		&& "$(abspath $(PY))" -m pip download -q --disable-pip-version-check --no-deps \
			--no-build-isolation --no-binary django "django==$$version" \
		&& folder=$$(basename *.tar.gz .tar.gz)/tests \
		&& tar -xzf *.tar.gz --strip-components=2 "$$folder/cache" "$$folder/sessions_tests" \
		&& rm *.tar.gz || echo "make: no tests of Django, so they are skipped"
	@touch $@

BESIDE := -n auto --maxprocesses 8 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder
test: $(VENV)/.installed-test $(BUILT) $(TWEMPROXY) $(PROMETHEUS) $(DJANGO_TESTS)
	$(PY) -m pytest -p no:benchmark $(BESIDE) $(ARGS)

# In a separate environment, for which pip takes the oldest versions only.
MINIMUM := build/minimum.txt
$(MINIMUM): pyproject.toml tests/packaging/minimum.py
	@mkdir -p $(@D)
	"$(PYTHON)" tests/packaging/minimum.py >$@

test-minimum: $(MINIMUM)
	PIP_CONSTRAINT="$(abspath $(MINIMUM))" $(MAKE) test VENV=.venv-minimum ARGS='$(ARGS)'

# The compiled core of the copy traces its lines and is many times slower, so that the tree keeps its
# own. Cython's plug-in for coverage.py reads the C source beside the extension. With sys.monitoring,
# the default from Python 3.13 on, coverage.py sees no compiled line (3.13.0). A test that fails
# doesn't end the target: tracing takes stack and time, so a few tests of deep nesting fail here.
# Processes that tests start aren't measured.
TRACED := build/traced
coverage: $(VENV)/.installed-coverage
	rm -rf $(TRACED)
	mkdir -p $(TRACED)
	cp -r dscache tests docs bench examples .ci .github LICENSE Makefile \
		$(wildcard .*.yaml *.in *.md *.py *.toml) $(TRACED)
	rm -f $(TRACED)/dscache/*.so
	sed -i.old '1s/$$/, linetrace=True/' $(TRACED)/dscache/_fast.pyx
	cd $(TRACED) && CFLAGS='-O0 -DCYTHON_TRACE_NOGIL=1 -DCYTHON_USE_SYS_MONITORING=0' \
		"$(abspath $(PY))" setup.py -q build_ext --inplace --force
	cp $(TRACED)/build/cython/dscache/_fast.c $(TRACED)/dscache
	-cd $(TRACED) && PYTHONPATH=. "$(abspath $(PY))" -m pytest -p tests.support.coverage_plugin \
		-p no:benchmark $(BESIDE) $(ARGS)
	cd $(TRACED) && "$(abspath $(PY))" -m coverage combine -q && "$(abspath $(PY))" -m coverage report

soak: $(VENV)/.installed-test $(BUILT)
	$(PY) -m tests.soak $(ARGS)

# In a copy, so that the tree keeps its own core. The process ends with the first report of a sanitizer.
SANITIZED := build/sanitized
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined
SANITIZED_RUN = cd $(SANITIZED) && PYTHONPATH=. PYTHONMALLOC=malloc \
	ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=4:suppressions=tests/soak/asan.supp \
	UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
	"$(abspath $(PY))"
sanitize: $(VENV)/.installed-test
	rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)
	cp -r dscache tests setup.py pyproject.toml README.md LICENSE $(SANITIZED)
	rm -f $(SANITIZED)/dscache/*.so
	cd $(SANITIZED) && CFLAGS='$(SANITIZERS) -g -O1' LDFLAGS='$(SANITIZERS)' \
		"$(abspath $(PY))" setup.py -q build_ext --inplace --force
	$(SANITIZED_RUN) -m tests.soak fuzz mutations own-reader finalizers shortage $(ARGS)

lint: $(VENV)/.installed-lint $(BUILT)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --strict dscache
	"$(VENV)/bin/lint-imports" --no-cache
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cython-lint dscache/_fast.pyx dscache/core/*.pxi
	$(PY) -m mypy.stubtest dscache._fast

format: $(VENV)/.installed-lint
	$(PY) -m ruff format .

# The wheel is built from the sdist, so that the suite checks both.
wheel: $(VENV)/.installed-wheel
	rm -rf dist build/lib.* build/cython build/bdist.*
	$(PY) -m build -q --no-isolation
	$(PY) tests/packaging/installed.py $(BESIDE) $(ARGS)

docs: $(VENV)/.installed-docs $(BUILT)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build -q -f docs/site/mkdocs.yml --strict

# A Chromium of the machine serves. Where there is none, apt-get's is unpacked with the libraries that
# are missing, and not installed.
CHROMIUM := $(VENV)/.chromium
$(CHROMIUM): $(CREATED)
	@rm -rf $(VENV)/chromium && mkdir -p $(VENV)/chromium/archives/partial
	@if command -v chromium-headless-shell || command -v chromium || command -v chromium-browser \
		|| command -v google-chrome; then :; \
	elif command -v apt-get >/dev/null; then \
		apt-get install -qq -y --download-only --no-install-recommends -o Debug::NoLocking=1 \
			-o "Dir::Cache=$(abspath $(VENV))/chromium" chromium-headless-shell >/dev/null \
		&& for package in $(VENV)/chromium/archives/*.deb; do \
			dpkg-deb -x "$$package" $(VENV)/chromium || exit 1; done; \
	else echo "make: found no Chromium; install one to open the site" >&2; exit 1; fi
	@rm -rf $(VENV)/chromium/archives $(VENV)/chromium/*.bin
	@touch $@

docs-test: docs $(CHROMIUM)
	$(PY) -m pytest -p no:benchmark docs/site $(ARGS)

bench: $(VENV)/.installed-bench $(BUILT)
	$(PY) -m pytest bench --benchmark-only --benchmark-min-rounds=7 --benchmark-max-time=1.4 \
		--report=bench/results $(ARGS)

# A few benchmarks are measured too, so that the report and the goals are made.
bench-smoke: $(VENV)/.installed-bench $(BUILT)
	$(PY) -m pytest bench --benchmark-disable -m 'not large' $(ARGS)
	$(PY) -m pytest bench --benchmark-only --benchmark-quiet --benchmark-max-time=0.05 \
		-k 'test_hits and goals or growth and get-10-' --report=build/bench-smoke
	$(PY) bench/stores.py 1

instructions: $(VENV)/.installed-bench $(BUILT)
	$(PY) -m pytest bench/instructions.py $(ARGS)

clean:
	rm -rf $(VENV) .venv-minimum build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f dscache/*.so dscache/_fast.c dscache/_fast.html
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
