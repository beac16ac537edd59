# What people type. Each target stands on its own: `make demo` in a fresh clone is enough.

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS  ?=

.PHONY: help venv demo lint test soak bench test-tools clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo     the quickstart: a dataplane, three consumers, a live table (no root needed)'
	@echo 'make test     the whole test suite; ARGS="-k config" is passed to pytest'
	@echo 'make soak     its stress tests with full counts'
	@echo 'make bench    all benchmarks, then docs/performance.md anew; ARGS="--only ring" is passed on; as root, ten or'
	@echo '              twenty minutes, on a machine that does nothing else'
	@echo 'make lint     ruff and mypy'
	@echo 'make venv     only makes .venv and installs into it'
	@echo 'make clean    removes .venv and everything generated'

venv: $(STAMP)

# Redone when pyproject.toml changes. A candidate is taken only if it really runs (a version manager's
# shim may not), is new enough and can make a virtual environment.
$(STAMP): pyproject.toml
	@python=; bare=; \
	for name in python3.13 python3.12 python3.11 python3; do \
		"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
		if "$$name" -c 'import ensurepip, venv' >/dev/null 2>&1; then python=$$name; break; fi; \
		bare=$${bare:-$$name}; \
	done; \
	if [ -z "$$python" ] && [ -n "$$bare" ]; then \
		version=$$("$$bare" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
		echo "make: $$bare cannot make virtual environments (it has no ensurepip)." >&2; \
		echo "make: on Debian and Ubuntu: apt-get install python$$version-venv" >&2; \
		exit 1; \
	elif [ -z "$$python" ]; then \
		echo "make: no Python 3.11 or newer found (tried python3.13, python3.12, python3.11, python3)." >&2; \
		echo "make: install one, for instance: apt-get install python3 python3-venv" >&2; \
		exit 1; \
	fi; \
	echo "$$python -m venv $(VENV)"; \
	"$$python" -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

demo: venv
	$(BIN)/dataplane demo

lint: venv
	$(BIN)/ruff check .
	$(BIN)/mypy

test: venv test-tools
	$(BIN)/python -m workers.kernels
	$(BIN)/python -m pytest -m "not stress" $(ARGS)

# The same tests with the counts that are too long for every day: 10^8 packets, 10^6 sleeps, insertions, datagrams.
soak: venv test-tools
	$(BIN)/python -m workers.kernels
	$(BIN)/python -m pytest -m stress --timeout 1200 $(ARGS)

# What it measures itself against beyond Python's packages (DPDK, a C compiler) is skipped if it is not there;
# docs/performance.md has the line that installs it.
bench: $(VENV)/.bench
	$(BIN)/python -m bench $(ARGS)

$(VENV)/.bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	@touch $@

# The live tests talk to a kernel peer through these. Without them those tests are skipped, and say so.
test-tools:
	@missing=; \
	for tool in ip tc ping socat nc curl; do \
		command -v $$tool >/dev/null 2>&1 || missing="$$missing $$tool"; \
	done; \
	[ -n "$$missing" ] || exit 0; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then \
		echo "make: not found:$$missing; the tests that need them are skipped"; exit 0; \
	fi; \
	echo "make: installing what the live tests need:$$missing"; \
	export DEBIAN_FRONTEND=noninteractive; \
	{ apt-get update -qq && apt-get install -y -qq --no-install-recommends \
		iproute2 iputils-ping socat netcat-openbsd curl >/dev/null; } \
		|| echo "make: could not install them; the tests that need them are skipped" >&2

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
