# make quickstart   environment, install, train and attack two mixtures on real images, the path of the report
# make test         lint, types, tests: what CI runs
# make slow, make nightly, make bench: what takes longer; nightly measures AutoAttack's parity on 500 images of the
# CIFAR-10 folder in $PHALANX_CIFAR10, if that is set

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test lint types unit slow nightly bench lock clean

quickstart: $(VENV)/installed
	$(BIN)/phalanx run quickstart

test: lint types unit

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

unit: $(VENV)/installed
	$(BIN)/pytest -n 2 -m "not slow and not nightly"

slow: $(VENV)/installed
	$(BIN)/pytest -n 2 -m slow

nightly: $(VENV)/installed
	$(BIN)/pytest -n 2 -m nightly
	if [ -n "$$PHALANX_CIFAR10" ]; then \
	  $(BIN)/python benchmarks/autoattack.py --images 500 --rounds 1 --saving-rounds 1 --out runs/nightly; fi

bench: $(VENV)/installed
	$(BIN)/python benchmarks/dispatch.py
	$(BIN)/python benchmarks/pgd.py
	$(BIN)/python benchmarks/rt_er.py
	$(BIN)/python benchmarks/soft.py
	$(BIN)/python benchmarks/layers.py
	$(BIN)/python benchmarks/dwf.py

$(VENV)/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# names, versions and hashes only; nothing younger than a week
lock:
	uv pip compile pyproject.toml --all-extras --universal --generate-hashes --python-version 3.11 \
	  --exclude-newer "$$(date -u -d '8 days ago' +%F)" --no-header --no-emit-index-url --no-emit-find-links \
	  -o requirements.lock

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
