# Two commands are all a fresh machine needs: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

SECONDS ?= 120
ONLY ?=

# Tests start hundreds of processes: each would compile the whole package again where this is set
export PYTHONDONTWRITEBYTECODE :=

.PHONY: site notebook dist demo test test-real quick mutate lint attack fuzz test-matrix

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install -q -e ".[serve]"
	@touch $@

$(VENV)/.installed-dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install -q -e ".[dev]"
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/trivium run laptop --runs runs

# One process more than cores, since many tests wait: for a socket, a lease, or another process
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
test: $(VENV)/.installed-dev
	$(PYTEST)

# A real checkpoint (100 MB, fetched once) against transformers, PEFT, TRL and llama.cpp; no part of `make test`.
# What is trained of it, several GB, lies on the disk and not in memory
REAL ?= $(HOME)/.cache/trivium/real
test-real: $(VENV)/.installed-dev
	@$(BIN)/python tests/real/fetch.py $(REAL); case $$? in \
	  0) TRIVIUM_REAL=$(REAL) PYTEST_DEBUG_TEMPROOT=$${TMPDIR:-/tmp} $(BIN)/python -m pytest -n 2 -m real \
	    -o tmp_path_retention_policy=failed tests/real;; 75) ;; *) exit 1;; esac

quick: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow" -x

# The quick tests under other kernels, threads and versions of torch: all cells, or
# for instance make test-matrix CELLS="mkl-avx2 threads-2" MATRIX=--kernels
test-matrix: $(VENV)/.installed-dev
	$(BIN)/python tests/matrix.py $(MATRIX) $(CELLS)

# For instance: make mutate PACKAGE="trivium/learn trivium/data" N=20 SEED=1
PACKAGE ?= trivium
N ?= 20
SEED ?= 1
mutate: $(VENV)/.installed-dev
	$(BIN)/python tests/mutate.py $(PACKAGE) --count $(N) --seed $(SEED)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck tests/golden/launch/*.sh

# Every class of attacks, on this machine's loopback and in scratch folders; one class alone: make attack ONLY=sandbox
attack: $(VENV)/.installed-dev
	cd tests && OMP_NUM_THREADS=1 $(abspath $(BIN))/python -m attack $(ONLY)

# Random inputs for SECONDS in all; one target alone: make fuzz ONLY=maths SECONDS=600
fuzz: $(VENV)/.installed-dev
	cd tests && OMP_NUM_THREADS=1 $(abspath $(BIN))/python -m fuzz --seconds $(SECONDS) $(ONLY)

# The pages of docs/ as a site, in build/site; a link to nowhere fails
site: $(VENV)/.installed-dev
	$(BIN)/mkdocs build --strict --quiet

notebook: $(VENV)/.installed-dev
	cd $$(mktemp -d) && $(abspath $(BIN))/jupyter execute $(abspath docs/notebooks/first_hour.ipynb)

# A wheel and an sdist, and the wheel in an environment of its own
dist: $(VENV)/.installed-dev
	rm -rf build/dist build/fresh && mkdir -p build && $(BIN)/python -m build --outdir build/dist . > build/dist.log
	$(PYTHON) -m venv build/fresh && build/fresh/bin/python -m pip install -q build/dist/*.whl
	build/fresh/bin/trivium plan pocket --runs build/fresh/runs
