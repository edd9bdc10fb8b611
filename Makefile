# Each target does its own set-up. Needs Python ≥ 3.11 and make, nothing else.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

help:  ## this list
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/:.*  ## /\t/' | expand -t 16

.PHONY: deploy-demo help quickstart real report test test-slow test-all test-long fuzz bench bench-peers lint notebooks docs clean

# Without bytecode every process compiles its imports again, about five seconds; some containers turn it off.
unexport PYTHONDONTWRITEBYTECODE

# uv installs in a quarter of pip's time. It does not read pip's settings, of which these two are passed on.
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
INSTALL := $(VENV)/bin/uv pip install --quiet --python $(PY)

$(VENV)/.run: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet uv
	$(INSTALL) -e .
	touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.run
	$(INSTALL) "torch==2.13.0" -e ".[test]"
	touch $@

# The extra has a stamp of its own, so that a second call needs no network.
$(VENV)/.real: $(VENV)/.%: pyproject.toml $(VENV)/.run
	$(INSTALL) -e ".[$*]"
	touch $@

quickstart: $(VENV)/.run  ## 9 clients, 3 tasks, 3 rounds of Pilot on the digit scenes
	$(VENV)/bin/pilot-jax run configs/quickstart.yaml

build/smollm2-dinov2: | $(VENV)/.real
	$(VENV)/bin/pilot-jax base smollm2-dinov2 $@

real: build/smollm2-dinov2  ## 12 clients on emoji and a real base (183 MB of downloads), and a page of the run
	$(VENV)/bin/pilot-jax run configs/real.yaml
	$(VENV)/bin/pilot-jax report --questions 2 --answers 2 "$$(ls -dt runs/*/ | head -1)"

report: $(VENV)/.run  ## a page of the newest run
	$(VENV)/bin/pilot-jax report "$$(ls -dt runs/*/ | head -1)"

# Both print the slowest tests. One process for each of two cores; a process without work takes over some of the other's.
PYTEST := $(PY) -m pytest -n 2 --dist worksteal --durations=20

test: lint  ## style, types, layers, then the core of the tests: six minutes
	$(PYTEST) -m "not slow and not long"

test-slow: $(VENV)/.test build/deploy/.made  ## what `make test` leaves out, but for the long tests: a quarter of an hour
	$(PYTEST) -m "slow and not long"

test-all: test test-slow  ## both

test-long: $(VENV)/.test build/deploy/.made  ## notebooks, four processes, kills, a soak, Chromium, Flower: an hour
	$(PYTEST) -m long

fuzz: $(VENV)/.test  ## everything that is read from outside; a quarter of an hour; Linux
	$(INSTALL) atheris
	$(PY) tests/fuzz/fuzz.py all 90

bench: $(VENV)/.test  ## this package and torch on the same work, side by side
	$(PY) benchmarks/peer.py

# Simulators with which whole jobs are compared, each in an environment of its own.
build/peers/torch/.made: PEER := transformers
build/peers/flower/.made: PEER := transformers "flwr[simulation]==1.42.0"
build/peers/pfl/.made: PEER := transformers "pfl[pytorch]==0.6.0"

build/peers/%/.made: | $(VENV)/.run
	$(VENV)/bin/uv venv --quiet --clear --python $(PY) $(@D)
	$(VENV)/bin/uv pip install --quiet --python $(@D)/bin/python "torch==2.13.0" $(PEER)
	touch $@

bench-peers: $(VENV)/.run $(patsubst %,build/peers/%/.made,torch flower pfl)  ## whole jobs of Flower, pfl-research, torch
	$(PY) benchmarks/peers/run.py

# Flower bounds typer, rich and protobuf: an environment of its own.
build/deploy/.made: pyproject.toml | $(VENV)/.run
	$(VENV)/bin/uv venv --quiet --clear --python $(PY) $(@D)
	$(VENV)/bin/uv pip install --quiet --python $(@D)/bin/python -e ".[deploy]"
	touch $@

deploy-demo: build/deploy/.made  ## three clients on a network of this machine, beside the simulator
	build/deploy/bin/python examples/deploy_demo.py

lint: $(VENV)/.test  ## style, types, layers
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

notebooks: $(VENV)/.test  ## run them again and keep what they show
	$(VENV)/bin/jupyter execute --inplace notebooks/*.ipynb

docs: $(VENV)/.test  ## the site, into build/site
	$(PY) docs/generate.py
	$(PY) -m mkdocs build --strict

clean:
	rm -rf $(VENV) build *.egg-info
