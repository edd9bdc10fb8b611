# Each target does its own set-up. Needs Python ≥ 3.11 and make, nothing else.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: quickstart report test test-long fuzz bench lint notebooks docs clean

$(VENV)/.run: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -e .
	touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.run
	$(PY) -m pip install --quiet "torch==2.13.0"
	$(PY) -m pip install --quiet -e ".[test]"
	touch $@

quickstart: $(VENV)/.run  ## 9 clients, 3 tasks, 3 rounds of Pilot on the digit scenes
	$(VENV)/bin/pilot-jax run configs/quickstart.yaml

report: $(VENV)/.run  ## a page of the newest run
	$(PY) -m pip install --quiet -e ".[plots]"
	$(VENV)/bin/pilot-jax report "$$(ls -dt runs/*/ | head -1)"

test: lint  ## style, types, layers, then every test
	$(PY) -m pytest -n 2 --dist loadfile

test-long: $(VENV)/.test  ## many kills and a soak: half an hour
	$(PY) -m pytest -m long

fuzz: $(VENV)/.test  ## everything that is read from outside; a quarter of an hour; Linux
	$(PY) -m pip install --quiet atheris
	$(PY) tests/fuzz/fuzz.py all 90

bench: $(VENV)/.test  ## this package and torch on the same work, side by side
	$(PY) benchmarks/peer.py

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
