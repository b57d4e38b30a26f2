# make run   the whole loop on this machine: install, then a world, an agent, a report
# make test  the unit and integration tests (under 15 minutes on 2 cores)
# make test-unit, test-all, coverage  the unit tests alone; all tests; what make test covers
# make lint  ruff, a strict type check, and which package may import which
# make docs  the documentation site, into build/site
# make domains  the environments of docs/domains.md: a browser and robot arms
# make bench ratios, each measured in one run
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS := 2
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
export OMP_NUM_THREADS := 1
# Hundreds of short processes import the package; compiling it each time takes a fifth of an import.
export PYTHONDONTWRITEBYTECODE :=
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install browser domains run test test-unit test-all coverage lint docs bench bench-agents bench-world \
    bench-serve bench-mup bench-pessimism bench-evaluate bench-fit bench-sweep bench-families \
    bench-storage bench-loader bench-buy bench-sac bench-starts bench-planner bench-scale bench-text-envs \
    bench-language bench-training bench-domains bench-images bench-pixels clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps openenv==0.10.0
	touch $(STAMP)

# Chromium, its driver and MiniWoB's pages. Its pin of a later Gymnasium concerns environments that
# are not used, so pip must not see it.
browser: install
	@if (command -v chromium || command -v google-chrome) >/dev/null \
	  && command -v chromedriver >/dev/null; then :; \
	elif ! command -v apt-get >/dev/null; then \
	  echo "make browser needs apt-get: install Chromium and its chromedriver of the same version" \
	    "in another way, so that both are on PATH, and run it again" >&2; exit 1; \
	elif [ "$$(id -u)" != 0 ]; then \
	  echo "make browser needs root for apt-get: run" \
	    "'sudo apt-get install chromium chromium-driver', and then it again" >&2; exit 1; \
	else apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y \
	  --no-install-recommends chromium chromium-driver >/dev/null; fi
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[browser]'
	$(BIN)/python -m pip install --quiet --no-deps miniwob==1.1.0

# The environments of docs/domains.md.
domains: browser
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[robotics,training]'

run: install
	$(BIN)/mesocosm loop -c loop/quickstart

test-unit: install
	$(PYTEST) -m unit

test: install
	$(PYTEST) -m 'not slow'

# Slow tests wait much: for nodes, for killed processes, for the end of an outage.
test-all: WORKERS := 3
test-all: install
	$(PYTEST) --durations 40

coverage: install
	$(PYTEST) -m 'not slow' --cov --cov-report term --cov-report html

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: install
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: bench-serve bench-world

bench-world bench-serve bench-mup bench-pessimism bench-evaluate bench-fit bench-sweep bench-families bench-storage bench-loader bench-buy bench-sac bench-starts bench-planner bench-scale bench-text-envs bench-language bench-training bench-images bench-pixels: install
	$(BIN)/python benchmarks/$(subst -,_,$@).py

bench-agents: install
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/bench_agents.py

bench-domains: domains
	$(BIN)/python benchmarks/bench_domains.py

clean:
	rm -rf $(VENV)
