# Everything runs in the active virtual environment, or else in .venv, which is made on first use.
PYTHON ?= python3
VENV ?= $(or $(VIRTUAL_ENV),.venv)
BIN := $(VENV)/bin
OUT ?= runs/v3-tiny-$(shell date +%Y%m%d-%H%M%S)
READY := $(VENV)/.tangram-ready

.PHONY: train test soak lint

train: $(READY)  ## Train a small DeepSeek-V3 on the Python standard library
	$(BIN)/tangram train v3-tiny --out $(OUT)

test: $(READY)  ## Run all tests
	$(BIN)/python -m pytest -q -n auto

soak: $(READY)  ## Run the long proofs: kills, mutated presets, minutes of a trainer that crashes
	TANGRAM_PROFILE=soak $(BIN)/python -m pytest -v -n auto --dist worksteal --durations=15 -m soak

lint: $(READY) .mypy  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.mypy $(BIN)/mypy -p tangram.core -p tangram.kernels -p tangram.plugins -p tangram.testing

# torch comes first and pinned, so that nothing asks for another build of it.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The folders as the packages that they are imported as, for a type checker that follows no editable install.
.mypy:
	mkdir -p .mypy/tangram
	for folder in core kernels plugins presets testing; do ln -sfn ../../$$folder .mypy/tangram/$$folder; done
