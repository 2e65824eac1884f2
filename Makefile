# Everything works from a fresh clone with Python 3.10 or newer as python3; nothing is installed
# outside .venv and .kombu-venv, except by `make deps`.

PYTHON ?= python3
BIN := .venv/bin
KOMBU := .kombu-venv/bin
PIP := -m pip --disable-pip-version-check install --quiet

# What `make demo` passes on when it is set, e.g. make demo BROKER=redis ENVIRONMENT=gevent
BROKER ?=
ENVIRONMENT ?=
CONNECTIONS ?=
CHANNELS ?=
MESSAGES ?=
BODY_SIZE ?=
DEMO_OPTIONS = $(if $(BROKER),--broker "$(BROKER)") $(if $(ENVIRONMENT),--environment $(ENVIRONMENT)) \
	$(if $(CONNECTIONS),--connections $(CONNECTIONS)) $(if $(CHANNELS),--channels $(CHANNELS)) \
	$(if $(MESSAGES),--messages $(MESSAGES)) $(if $(BODY_SIZE),--body-size $(BODY_SIZE))

# Further pytest arguments, e.g. make test-gevent PYTEST="-k pool -x"
PYTEST ?=
# Which tests, where it is not pyproject.toml's choice.
SELECT ?=
RUN = GREENKOMBU_KOMBU_PYTHON="$(CURDIR)/$(KOMBU)/python" $(BIN)/python -m

# What exercises the hub: it runs by itself and its coverage is measured, which would slow down the
# rest for nothing.
HUB_TESTS = tests/hub tests/contract/test_hubs.py tests/contract/test_pollers.py \
	tests/contract/test_pool_faults.py tests/scenarios/test_hub.py tests/scenarios/test_pools.py

.PHONY: help
help:
	@echo "make demo      the main job: many connections, one drain loop, no server needed;"
	@echo "               BROKER=rabbitmq or BROKER=redis starts one for the run"
	@echo "make test      lint, types and the tests in default, gevent and eventlet"
	@echo "make test-all  the same with the slow tests and the full fault matrix"
	@echo "make test-ENV  one environment: default gevent eventlet gevent-unpatched gevent-late"
	@echo "make coverage  the hub's tests and their coverage of it, at least 95 %"
	@echo "make lint      ruff, mypy, import contracts"
	@echo "make deps      install the brokers that the tests need"
	@echo "make bench     benchmarks beside Kombu and others; BENCH=amqp runs one of them"
	@echo "make deps-bench  install the C client and strace, for make bench"
	@echo "make soak      ten minutes of random faults, nothing lost; SECONDS=60 ENVIRONMENT=eventlet SEED=1"
	@echo "               BROKER=amqp, redis or sentinel"
	@echo "make venv docs build clean"

# -- what is needed ------------------------------------------------------------------------------

.PHONY: deps
deps:
	@sh scripts/deps.sh

.PHONY: venv
venv: .venv/.ready-dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; name it with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo "venv is missing: apt-get install python3-venv, or name a Python with PYTHON=..." >&2; \
		exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python $(PIP) --upgrade pip

.venv/.ready-run: pyproject.toml | $(BIN)/python
	$(BIN)/python $(PIP) -e '.[cli,eventlet,gevent,redis]'
	@touch $@

# pip knows --group since 25.1.
.venv/.ready-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python $(PIP) --upgrade 'pip>=25.1'
	$(BIN)/python $(PIP) -e '.[brotli,cli,eventlet,gevent,msgpack,pika,redis,yaml,zstd]' \
		--group test --group lint --group bench
	@touch .venv/.ready-run $@

.venv/.ready-docs: pyproject.toml | .venv/.ready-dev
	$(BIN)/python $(PIP) --group docs
	@touch $@

# Kombu itself, for the tests and benchmarks that compare; never in the same environment as ours.
.kombu-venv/.ready: pyproject.toml
	$(PYTHON) -m venv .kombu-venv
	$(KOMBU)/python $(PIP) --upgrade 'pip>=25.1'
	$(KOMBU)/python $(PIP) --group reference
	@touch $@

# -- checks --------------------------------------------------------------------------------------

.PHONY: lint
lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Much of a run is waiting, so three at a time; each prints when it has ended.
.PHONY: test
test: deps venv .kombu-venv/.ready
	$(MAKE) lint
	$(BIN)/python -m coverage erase
	@echo "Three processes at a time; what one prints comes when it has ended, after minutes."
	$(MAKE) --keep-going --output-sync=target -j3 \
		suite-default suite-gevent suite-eventlet hub-default hub-gevent hub-eventlet \
		variant-gevent-unpatched variant-gevent-late
	$(MAKE) coverage-report

.PHONY: suite-default suite-gevent suite-eventlet variant-gevent-unpatched variant-gevent-late
suite-default suite-gevent suite-eventlet: suite-%:
	$(RUN) tests.run $* -- $(addprefix --ignore=,$(HUB_TESTS)) $(SELECT) $(PYTEST)

variant-gevent-unpatched variant-gevent-late: variant-%:
	$(RUN) tests.run $* -- -m green_matrix $(PYTEST)

.PHONY: hub-default hub-gevent hub-eventlet coverage-report
# In default without coverage's support for greenlets: it keeps each thread in a weak dictionary, in
# whose clean-up, traced as well, two runs hung.
hub-default hub-gevent hub-eventlet: hub-%:
	$(RUN) coverage run $(if $(filter default,$*),--concurrency=thread) -m tests.run $* -- $(HUB_TESTS) $(SELECT) $(PYTEST)

coverage-report:
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --include='hub/*' --fail-under=95

.PHONY: coverage
coverage: venv
	$(BIN)/python -m coverage erase
	$(MAKE) --keep-going --output-sync=target -j2 hub-default hub-gevent hub-eventlet
	$(MAKE) coverage-report

# An empty -m selects all markers.
.PHONY: test-all
test-all:
	$(MAKE) test SELECT='-m ""'

.PHONY: test-default test-gevent test-eventlet
test-default test-gevent test-eventlet: test-%: venv .kombu-venv/.ready
	$(RUN) tests.run $* -- $(SELECT) $(PYTEST)

.PHONY: test-gevent-unpatched test-gevent-late
test-gevent-unpatched test-gevent-late: test-%: venv
	$(RUN) tests.run $* -- -m green_matrix $(PYTEST)

# -- programs ------------------------------------------------------------------------------------

.PHONY: demo
demo: .venv/.ready-run
	$(BIN)/python -m greenkombu demo $(DEMO_OPTIONS)

# Publishes and consumes under random faults; fails if a confirmed message is lost.
SECONDS ?= 600
SEED ?=

.PHONY: soak
soak: deps venv
	$(BIN)/python -m tests.soak $(or $(ENVIRONMENT),gevent) --broker $(or $(BROKER),amqp) \
		--seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

# Each program prints ratios; those that compare run Kombu with GREENKOMBU_KOMBU_PYTHON. The first
# ones also write benchmarks/results/ and their sections of docs/performance.md.
BENCH_WRITE := amqp redis memory pool hub import
BENCH ?= $(BENCH_WRITE) amqp_codec producer serialization
BENCH_OPTIONS ?=

.PHONY: bench
bench: deps venv .kombu-venv/.ready
	@for name in $(BENCH); do \
		case " $(BENCH_WRITE) " in *" $$name "*) write=--write ;; *) write= ;; esac; \
		echo "== benchmarks/bench_$$name.py"; \
		GREENKOMBU_KOMBU_PYTHON="$(CURDIR)/$(KOMBU)/python" $(BIN)/python \
			"benchmarks/bench_$$name.py" $$write $(BENCH_OPTIONS) || exit 1; \
	done

# What `make bench` also compares with where it is there: rabbitmq-c, and strace to count.
.PHONY: deps-bench
deps-bench:
	@sh scripts/deps.sh bench

.PHONY: docs
docs: .venv/.ready-docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

.PHONY: build
build: $(BIN)/python
	$(BIN)/python $(PIP) build
	$(BIN)/python -m build

.PHONY: clean
clean:
	rm -rf .venv .kombu-venv build dist docs/_build htmlcov *.egg-info
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	rm -f .coverage .coverage.*
	find hub greenkombu tests -name __pycache__ -type d -prune -exec rm -rf {} +
