# Every target sets up what it needs in .venv. CI runs `make check test`.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# In some containers Python keeps nothing compiled, and every process then compiles torch and vLLM anew: 3 to 13 s of its
# start. What is kept lies in .venv and in __pycache__, which git ignores.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup quickstart test test-unit test-gpu test-real mutants exits cluster-programs cluster test-cluster bench bench-quick bench-gpu bench-curves bench-density bench-quickstart bench-online bench-operator canary-report adaptive-order-report corrections-report models-table real-model-report page-report page-cost pictures images check crd docs site clean

setup: $(VENV)/.installed

# uv, because only uv honors the overrides in pyproject.toml; it is installed in the same environment.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --group dev -e '.[learner,sampler-cpu,operator,plot,reasoning,trackio,ui]'
	touch $@

quickstart: setup
	$(BIN)/heterorl run examples/quickstart.yaml

test: setup test-unit cluster-programs
	$(BIN)/python -m pytest tests/process tests/contract tests/system tests/cluster --ignore tests/system/real

# No process and no engine is started in these: under a minute.
test-unit: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/unit

# On a machine with a GPU, without a download: the learner and the engines against the CPU, and the figures of a step at
# the size of Qwen3-1.7B. Meant for under 10 minutes on one card. Without a GPU every test is skipped.
test-gpu: setup
	$(BIN)/python -m pytest -rA tests/gpu

# A real model of 135 M parameters, from PyPI, in whole runs of three steps: both data types, both engines, recorded in
# docs/reports/real-model-tests.md. Meant for under 15 minutes on two cores.
test-real: setup
	HETERORL_REPORT=docs/reports/real-model-tests.md $(BIN)/python -m pytest -rA tests/system/real

# Would the tests notice? One line broken at a time, recorded in docs/reports/mutants.md: under 10 minutes.
mutants: setup
	PYTHONPATH=tests $(BIN)/python -m mutants.run --report docs/reports/mutants.md

# Do learners of two processes always end with exit code 0? 200 endings over all strategies, recorded in
# docs/reports/exits.md: about 15 minutes.
exits: setup
	OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu PYTHONPATH=tests $(BIN)/python tests/process/test_exits.py $(or $(ENDINGS),200) --report docs/reports/exits.md

# Kubernetes, etcd, containerd and the rest, built from pinned Go modules: a quarter of an hour, then cached.
cluster-programs:
	$(PYTHON) tests/cluster/build.py

# Starts a test cluster until Ctrl-C: make cluster LEVEL=apiserver|controllers|kwok|node
cluster: setup cluster-programs
	PYTHONPATH=tests $(BIN)/python -m cluster.harness $(or $(LEVEL),controllers)

test-cluster: setup cluster-programs
	$(BIN)/python -m pytest tests/cluster

# Ours against a peer, measured in turn, into docs/benchmarks.md: under 25 minutes on two cores. IDS="8-time 11-pick" only
# those; DIR a folder for the files.
bench: setup
	PYTHONPATH=tests $(BIN)/python -m bench $(if $(DIR),--dir $(DIR)) $(IDS)

# The same in three minutes, small and with few rounds: gates and gross regressions. Records nothing.
bench-quick: setup
	PYTHONPATH=tests $(BIN)/python -m bench --quick $(if $(DIR),--dir $(DIR)) $(IDS)

# The learner at the size of Qwen3-1.7B beside TRL, on one GPU of 80 GB: under nine minutes.
bench-gpu: setup
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
	  || { echo "bench-gpu: there is no GPU here; docs/benchmarks.md keeps what it has, or \"not measured\""; exit 0; } \
	  && PYTHONPATH=tests $(BIN)/python -m bench $(if $(DIR),--dir $(DIR)) gpu-tokens gpu-mfu gpu-memory gpu-publish

# How costs grow, into docs/benchmarks.png: under a minute.
bench-curves: setup
	PYTHONPATH=tests $(BIN)/python -m bench.curves

# How many weights training changes, and what deltas of them take: MODEL=folder TEXTS=file, a quarter of an hour for 135 M
# parameters. Prints a table.
bench-density: setup
	PYTHONPATH=tests $(BIN)/python -m bench.density $(MODEL) $(TEXTS)

# The quickstart's seconds to its last step, now and at an earlier commit (BEFORE), into docs/benchmarks.md: ten minutes.
bench-quickstart: setup
	PYTHONPATH=tests $(BIN)/python -m bench.quickstart $(if $(BEFORE),--before $(BEFORE))

# What online.yaml drops, and how long its learner waits, now and at an earlier commit (BEFORE), in three runs each, into
# docs/benchmarks.md: ten minutes.
bench-online: setup
	PYTHONPATH=tests $(BIN)/python -m bench.online $(if $(BEFORE),--before $(BEFORE))

# Time, memory and writes of the operator with many runs, recorded in docs/benchmarks.md: half an hour. RUNS=1000 prints
# only that row.
bench-operator: setup cluster-programs
	PYTHONPATH=tests $(BIN)/python -m bench.operator_scale $(or $(RUNS),--record)

# What the canary sees, measured on a real model and a tiny one, into docs/reports/canary.md: about an hour on two cores.
# DATA is the folder of the datasets that the tests use (HETERORL_TEST_DATA).
canary-report: setup
	PYTHONPATH=tests $(BIN)/python -m bench.canary --gsm8k $(DATA)/gsm8k/train.jsonl

# Reward against generated tokens with the adaptive and the shuffled order, into docs/reports/adaptive-order.md: about ten
# minutes on one core.
adaptive-order-report: setup
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m bench.adaptive_order

# What losses and corrections make of stale rollouts of a tiny model, into docs/reports/corrections.md: five minutes.
corrections-report: setup
	PYTHONPATH=tests $(BIN)/python -m bench.corrections

# What the learner, the transformers engine and vLLM make of every small causal architecture, and of heads, files and data
# types of some, into docs/models.md: half an hour on two cores for the first table. Each row is recorded at once.
models-table: setup
	for part in table vllm forms; do OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m bench.models_table $$part || exit 1; done

# The run of examples/smollm2.yaml, with its time and memory, into docs/reports/real-model.md: a quarter of an hour on two
# idle cores. A run that is in runs/ already is only reported.
real-model-report: setup
	PYTHONPATH=tests $(BIN)/python -m bench.real_model

# Milliseconds of every interaction with the page of `heterorl ui` in Chromium, and seconds of the quickstart with and
# without the page open, in turn; both into docs/ui.md.
page-report: setup
	PYTHONPATH=tests $(BIN)/python -m bench.ui_speed

page-cost: setup
	PYTHONPATH=tests $(BIN)/python -m bench.ui_speed --cost $(or $(PAIRS),3)

# The pictures of README and docs/ in docs/pictures: of three quickstart runs and one on the test cluster, a quarter of an
# hour. RUNS=FOLDER has such runs already; ONLY=page or ONLY=cluster makes only these.
pictures: setup $(if $(filter page,$(ONLY)),,cluster-programs)
	PYTHONPATH=tests $(BIN)/python -m bench.pictures $(if $(RUNS),--runs $(RUNS)) $(if $(ONLY),--only $(ONLY))

# The container images, with buildah or docker: make images REGISTRY=registry.example.com/heterorl EXTRA=sampler-cpu
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
IMAGES ?= operator learner sampler
REGISTRY ?= localhost/heterorl
TAG ?= $(VERSION)
EXTRA ?= sampler
BUILDER ?= $(notdir $(firstword $(shell command -v buildah docker)))
BUILD_FLAGS ?=

images:
	@test -n "$(BUILDER)" || { echo "images are built with buildah or docker, and neither is installed: apt-get install buildah" >&2; exit 1; }
	set -e; for image in $(IMAGES); do \
	  $(BUILDER) build $(if $(filter buildah,$(BUILDER)),--layers) $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) \
	    --build-arg EXTRA=$(EXTRA) --build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD) $(BUILD_FLAGS) \
	    --tag $(REGISTRY)/$$image:$(TAG) --file images/$$image/Dockerfile .; \
	done

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/heterorl crd --check
	$(BIN)/heterorl docs --check

crd: setup
	$(BIN)/heterorl crd

docs: setup
	$(BIN)/heterorl docs

# The pages of docs/ as a site in site/, which needs no network where it is read.
site: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
