# Each target sets up what it needs: Python 3.11 or later with venv, make and a package index are enough.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
UNIT_SUITE := tests/emulated/test_unit_suite.py
INJECTION := tests/emulated/test_injection.py
ADOPTION := tests/emulated/test_adoption.py tests/emulated/test_calls.py
# Two processes: tests wait for processes and hosts more than they compute, and a host runs its one CPU in one thread.
# What a file's tests share is made once, and a host is booted in one of them.
BY_FILE := --numprocesses=2 --dist=loadfile
BY_HOST := --numprocesses=2 --dist=loadgroup

# grpcio-tools 1.62.3 has wheels for Python 3.11 and 3.12 only, and can't share an environment with protobuf >= 5.
PROTO_PYTHON ?= $(firstword $(foreach python,python3.12 python3.11 python3,\
	$(shell $(python) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $(python))))
PROTO_VENV := .venv-proto
PROTO_READY := $(PROTO_VENV)/.ready
PROTO_TOOLS := grpcio-tools==1.62.3 mypy-protobuf==3.6.0 "setuptools<81"

.PHONY: help
help: ## Say what there is
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

$(READY): pyproject.toml tools/dev_requirements.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $$($(BIN)/python tools/dev_requirements.py) --editable .
	touch $@

$(PROTO_READY): Makefile
	@test -n "$(PROTO_PYTHON)" || { echo "make proto needs Python 3.11 or 3.12; name one with PROTO_PYTHON=" >&2; exit 1; }
	$(PROTO_PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/pip install --quiet --disable-pip-version-check $(PROTO_TOOLS)
	touch $@

.PHONY: demo
demo: $(READY) ## The main job, on a simulated VM
	@$(BIN)/python examples/demo.py

.PHONY: demo-s390x
demo-s390x: $(READY) ## The main job, on a real s390x kernel in the emulated host
	@$(BIN)/python -m tests.emulated.demo

.PHONY: test
test: lint proto-check ## Everything that checks the project
	# The images of the emulated hosts are built, where they aren't, beside the tests that need none.
	@$(BIN)/python -m tests.emulated.prepare & prepare=$$!; trap "kill $$prepare 2>/dev/null" EXIT; \
	$(BIN)/pytest $(BY_FILE) -m "not emulated" --ignore=tests/injection && wait $$prepare
	# By itself: it forks, which a process must not that has gRPC's threads, nor are their descriptors its own.
	$(BIN)/pytest tests/injection
	$(BIN)/pytest $(BY_HOST) -m emulated $(addprefix --ignore=,$(UNIT_SUITE) $(ADOPTION) $(INJECTION))
	# By themselves: the hosts that the others share take two gigabytes each, and CPU, for as long as they are up.
	$(BIN)/pytest $(BY_HOST) $(ADOPTION)
	$(BIN)/pytest $(UNIT_SUITE)

# What promises real kernels fails where there is none, and doesn't skip.
test-kernels test-big-endian test-injection: export SKEYD_REQUIRE_EMULATED := 1

.PHONY: test-kernels
test-kernels: $(READY) ## The contract on Linux 6.1, 6.12 and 7.x, with 1,000 random histories each
	$(BIN)/python -m tests.emulated.prepare bookworm trixie forky
	SKEYD_EMULATED_SUITES="bookworm trixie forky" SKEYD_HISTORIES=1000 $(BIN)/pytest tests/contract -o timeout=0

.PHONY: test-big-endian
test-big-endian: $(READY) ## All unit tests on all three emulated hosts, where `make test` runs a share on each
	$(BIN)/python -m tests.emulated.prepare bookworm trixie forky
	SKEYD_EMULATED_SUITES="bookworm trixie forky" SKEYD_ALL_UNIT_TESTS=1 $(BIN)/pytest $(UNIT_SUITE)

.PHONY: test-injection
test-injection: $(READY) ## Calls in other processes: the contract through one, and an unmodified QEMU, on a 6.x and a 7.x kernel
	$(BIN)/python -m tests.emulated.prepare bookworm forky
	SKEYD_EMULATED_SUITES="bookworm forky" SKEYD_CONTRACT_PLACE=adopted $(BIN)/pytest -m emulated tests/contract
	SKEYD_EMULATED_SUITES="bookworm forky" $(BIN)/pytest $(INJECTION)

.PHONY: soak
soak: $(READY) ## 10,000 random kills of front, worker and client in the middle of calls; `make test` has 500
	SKEYD_KILLS=10000 $(BIN)/pytest tests/faults/test_random_kills.py

.PHONY: benchmark
benchmark: $(READY) ## What GETs and verified SETs cost, as ratios to the raw ioctls, on a real s390x kernel in the emulated host
	$(BIN)/python -m tests.emulated.prepare
	$(BIN)/python -m benchmarks.repair $(or $(SKEYD_EMULATED_SUITES),bookworm forky)
	$(BIN)/python -m benchmarks.end_to_end $(or $(SKEYD_EMULATED_SUITES),bookworm forky) $(BENCHMARK)

# Against a C++ gRPC server, which they build from Debian's packages; root installs those that are missing.
.PHONY: benchmark-streams
benchmark-streams: $(READY) ## Whole streams against a C++ gRPC server and a bare copy, and from a slow source
	$(BIN)/python -m benchmarks.streams $(BENCHMARK)

.PHONY: benchmark-encodings
benchmark-encodings: $(READY) ## Guests' keys in each encoding, on loopback and over 1 Gbit/s (needs root)
	$(BIN)/python -m benchmarks.encodings $(BENCHMARK)

.PHONY: benchmark-latency
benchmark-latency: $(READY) ## Single calls and pings, idle and beside streams and 10,000 connections
	$(BIN)/python -m benchmarks.latency $(BENCHMARK)

.PHONY: benchmark-memory
benchmark-memory: $(READY) ## Memory of front, worker and client while keys pass
	$(BIN)/python -m benchmarks.memory $(BENCHMARK)

.PHONY: benchmark-page
benchmark-page: $(READY) ## Put the figures in benchmarks/figures into docs/benchmarks.md
	$(BIN)/python -m benchmarks.page

.PHONY: lint
lint: $(READY) ## Style, types, the direction of imports, the contract, generated pages
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/python tools/make_docs.py --check

.PHONY: proto
proto: $(PROTO_READY) ## Generate skeyd/v1 and skeyd/standard.binpb from the .proto files
	PATH=$(CURDIR)/$(PROTO_VENV)/bin:$$PATH $(PROTO_VENV)/bin/python tools/make_proto.py

.PHONY: proto-check
proto-check: ## Fail where the generated files are stale
	@if [ -n "$(PROTO_PYTHON)" ]; then \
		$(MAKE) --no-print-directory proto-check-all; \
	elif [ "$$CI" = true ]; then \
		echo "proto-check needs Python 3.11 or 3.12" >&2; exit 1; \
	else \
		echo "proto-check: no Python 3.11 or 3.12 here, which its tools need; only checksums are checked, by the tests"; \
	fi

.PHONY: proto-check-all
proto-check-all: $(PROTO_READY)
	PATH=$(CURDIR)/$(PROTO_VENV)/bin:$$PATH $(PROTO_VENV)/bin/python tools/make_proto.py --check

.PHONY: format
format: $(READY) ## Put the code into form
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

.PHONY: docs
docs: $(READY) ## Make the pages that are generated
	$(BIN)/python tools/make_docs.py

.PHONY: emulated-host
emulated-host: $(READY) ## Build the emulated s390x hosts that aren't cached (needs root and Debian packages)
	SKEYD_REQUIRE_EMULATED=1 $(BIN)/python -m tests.emulated.prepare bookworm trixie forky

.PHONY: clean
clean: ## Remove what the targets made here (not the cache of emulated hosts)
	rm -rf $(VENV) $(PROTO_VENV) build *.egg-info benchmarks/peer/build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
