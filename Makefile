# make test    set everything up in .venv, then lint, types and tests
# make demo    set everything up in .venv, then train, prune, fine-tune and export a detector on generated images
# make bench   measure graph, scores, choice and repair against Torch-Pruning, and decoders too big to hold (two hours; BENCHES='budgets latency': those)
# make bench-zoo  time whole cuts of the zoo's networks against Torch-Pruning (an hour; BENCH_ZOO_ARGS='--sample 120': some)
# make zoo     prune real networks of many libraries, built at random, and check everything on each
# make clean   remove .venv, caches and the output of demo, bench and zoo

PYTHON ?= python3
PYTEST_ARGS ?=
ZOO_ARGS ?=
BENCH_ZOO_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# the environment is made from pyproject.toml alone, and again whenever that, or the Python, changes
KEY := $(shell $(PYTHON) -c 'import hashlib, sys; print(hashlib.sha256(open("pyproject.toml", "rb").read() + sys.version.encode()).hexdigest()[:16])')
BENCHES ?= graph scale scoring choice repair
MADE := $(VENV)/made-from-$(KEY)
MADE_BENCH := $(VENV)/made-bench-from-$(KEY)
MADE_ZOO := $(VENV)/made-zoo-from-$(KEY)

.PHONY: help venv test demo bench bench-zoo zoo clean
help:
	@sed -n 's/^# make/make/p' Makefile

venv: $(MADE)

$(MADE):
	@$(PYTHON) -c 'import sys; sys.exit("Prunus needs Python 3.10 or newer; say which with: make PYTHON=python3.12 ..." if sys.version_info < (3, 10) else 0)'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(MADE_BENCH): $(MADE)
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	touch $@

$(MADE_ZOO): $(MADE)
	$(BIN)/python -m pip install --quiet --editable '.[zoo]'
	touch $@

test: $(MADE)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PYTEST_ARGS)

demo: $(MADE)
	rm -rf runs/demo
	$(BIN)/prunus yolo --model yolov8n.yaml --data shapes --macs 0.5 --imgsz 160 --out runs/demo

bench: $(MADE_BENCH)
	@status=0; for name in $(BENCHES); do \
	  echo "== $$name"; $(BIN)/python benchmarks/$$name.py --out runs/bench/$$name.json || status=1; \
	done; exit $$status

bench-zoo: $(MADE_BENCH) $(MADE_ZOO)
	$(BIN)/python benchmarks/zoo.py --out runs/bench/zoo.json $(BENCH_ZOO_ARGS)

zoo: $(MADE_ZOO)
	$(BIN)/python zoo/run.py --out runs/zoo $(ZOO_ARGS)

clean:
	rm -rf $(VENV) runs/demo runs/bench runs/zoo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
