# The workshop. Every target first makes .venv ready; afterwards `.venv/bin/python -m ...` is all that is needed.
#
# Variables (make VARIABLE=value target):
#   PYTHON       interpreter that .venv is made from
#   TORCH_INDEX  extra package index for torch; empty: the default index, whose Linux wheels carry CUDA. On a machine
#                without a GPU, https://download.pytorch.org/whl/cpu saves several gigabytes.
#   WORKERS      tests that run side by side; each starts processes of its own
#   SIZES        small: `make bench` at tiny sizes
#   RECIPE, ARGS recipe and further arguments (key.sub=value ...) of `make run`; ARGS also goes to `make reproduce`
#                and `make bench`

PYTHON ?= python3.11
TORCH_INDEX ?=
WORKERS ?= 2
RECIPE ?= sudoku
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.setup-done
# Several processes share few cores, so each computes with one thread.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal

.NOTPARALLEL:
.PHONY: setup run dashboard test test-fast test-slow lint format reproduce bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml deploy/constraints.txt
	@echo "setting up $(VENV): a few minutes the first time"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		--constraint deploy/constraints.txt --editable '.[dev]'
	$(PY) -m learner.build_ops
	touch $(STAMP)

run: setup
	$(PY) -m learner.main recipe=$(RECIPE) run.dir=runs run.dashboard=true $(ARGS)

# Stays when runs end; Ctrl-C ends it.
dashboard: setup
	$(PY) -m services.dashboard --runs runs $(ARGS)

# The fast suite first: when it fails, the end-to-end tests are not worth their minutes.
test: test-fast test-slow

test-fast: setup
	$(PYTEST) -m "not slow and not e2e"

test-slow: setup
	$(PYTEST) -m "slow or e2e"

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

reproduce: setup
	$(PY) -m learner.reproduce $(ARGS)

# Prints the ratios and keeps them in runs/bench; 13 minutes. SIZES=small takes one, and measures nothing.
bench: setup
	OMP_NUM_THREADS=1 $(PY) -m learner.bench $(if $(filter small,$(SIZES)),--small) $(ARGS)

# Leaves .venv and runs/ alone.
clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find services learner rollout rewards tests -name __pycache__ -type d -prune -exec rm -rf {} +
