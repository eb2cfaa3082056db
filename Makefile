# mergebound: every target creates and reuses a local virtual environment by itself.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PEERS  ?= .venv-peers
RESULTS ?= out/merging

.DEFAULT_GOAL := help
.PHONY: help install demo test lint docs soak bench bench-peers clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -e 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## create .venv and install the project with its development tools

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev,ray]'
	touch $@

demo: $(STAMP)  ## fine-tune, predict, merge, measure and report on the embedded digits (about 5 minutes)
	$(BIN)/mergebound demo --out out/demo

test: $(STAMP)  ## run the test suite (under 6 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs  ## build the site in out/docs: runs the gallery, every code block and every command of the pages
	OMP_NUM_THREADS=1 $(BIN)/python docs/building/run_pages.py
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -q -d out/doctrees docs out/docs
	$(BIN)/python docs/building/links.py out/docs

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@

soak: $(STAMP)  ## 1,000 short runs killed 20 times, by two runners, on a full disk: equal bits (about an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak.soak

bench: $(STAMP)  ## timings, as ratios measured in one run
	for f in $(filter-out benchmarks/merging.py,$(wildcard benchmarks/*.py)); do \
	  echo "== $$f"; $(BIN)/python -P $$f || exit 1; done
	$(BIN)/python benchmarks/merging.py --quick --peers $(PEERS)

bench-peers: $(STAMP) $(PEERS)/.installed  ## merging files: ours, mergekit and FusionBench (over an hour, 16 GB of disk)
	$(BIN)/python benchmarks/merging.py --large --many --peers $(PEERS) --out $(RESULTS)

$(PEERS)/.installed: benchmarks/peers.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --upgrade pip
	$(PEERS)/bin/python -m pip install --quiet -r benchmarks/peers.txt
	touch $@

clean:  ## remove the environment, caches and outputs
	rm -rf $(VENV) $(PEERS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
