# `make demo` and `make test` set up all they need. Another Python: make setup PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PACKAGES := torch torchvision fvcore iopath pycocotools ninja opencv-python-headless matplotlib tensorboard \
	pytest ruff setuptools wheel

.PHONY: setup demo test lint format clean

setup: $(VENV)/.ready

$(VENV)/.ready: constraints.txt pyproject.toml tools/install_detectron2.py
	@echo "Setting up $(VENV): torch with CUDA libraries is about 5.5 GB the first time"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt $(PACKAGES)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python tools/install_detectron2.py
	$(PIP) --constraint constraints.txt --no-build-isolation --editable .
	@touch $@

demo: setup
	$(BIN)/python tools/demo.py

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build output *.egg-info
