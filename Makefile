# `make demo` and `make test` set up all they need. Others than the tested versions, in a fresh clone:
# make setup PYTHON=python3.12 TORCH=2.9.1
PYTHON ?= python3
TORCH ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# timm: for its backbones, and the ViT of Detectron2's HEAD. onnx and onnxruntime: for exported students.
PACKAGES := torch torchvision fvcore iopath ijson pycocotools ninja opencv-python-headless matplotlib tensorboard \
	hypothesis pytest pytest-xdist ruff clang-format setuptools tabulate timm onnx onnxruntime wheel
# With another torch, torchvision is the one that fits it.
CONSTRAINTS := $(VENV)/constraints.txt
SOURCES := $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: setup demo test matrix fuzz stress sanitize check-gpu bench lint format clean

setup: $(VENV)/.ready

$(VENV)/.ready: constraints.txt pyproject.toml setup.py tools/install_detectron2.py gkd_d2/losses/fused.py $(SOURCES)
	@echo "Setting up $(VENV): torch with CUDA libraries is about 6 GB the first time, 8 while they are unpacked"
	$(PYTHON) -m venv $(VENV)
	{ $(if $(TORCH),grep -v ^torch constraints.txt; echo torch==$(TORCH),cat constraints.txt); } > $(CONSTRAINTS)
	$(PIP) --constraint $(CONSTRAINTS) $(PACKAGES)
	PIP_CONSTRAINT=$(CONSTRAINTS) $(BIN)/python tools/install_detectron2.py
	$(PIP) --constraint $(CONSTRAINTS) --no-build-isolation --editable .
	@$(BIN)/python -W ignore -m gkd_d2.collect_env
	@touch $@

demo: setup
	$(BIN)/python tools/demo.py

# A file's tests share what they train, so a file goes to one process.
test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The test suite on other versions, of all that is committed; DETECTRON2 is the folder of Detectron2 HEAD's source.
ROWS ?=
MATRIX ?= build/matrix

matrix:
	MATRIX=$(MATRIX) bash tools/matrix.sh $(ROWS)

# What only a GPU can show, compute-sanitizer's findings and the times of both benchmarks included.
check-gpu: setup
	bash tools/check_gpu.sh $(BIN)/python

bench: setup
	$(BIN)/python tools/benchmark_losses.py --device cpu --shapes kitti --batch 2

# The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer. Leaks are not looked for: Python leaves some.
SANITIZED := build/sanitized
SANITIZERS = $(shell gcc -print-file-name=libasan.so) $(shell gcc -print-file-name=libubsan.so)

sanitize: setup
	FORCE_CPU=1 GKD_D2_SANITIZE=1 $(BIN)/python setup.py --quiet build --build-lib $(SANITIZED) --build-temp $(SANITIZED)/temp
	cd $(SANITIZED) && LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(abspath $(BIN))/python -m pytest --rootdir $(CURDIR) -p no:cacheprovider $(CURDIR)/tests/losses/test_fused.py \
		$(CURDIR)/tests/losses/test_extreme_levels.py

# 100,000 hostile inputs, shared by the five readers.
fuzz: setup
	FUZZ_EXAMPLES=20000 $(BIN)/python -m pytest tests/data/test_fuzz.py

# Runs that are killed ten times, single bits of checkpoints flipped, data as large as KITTI and COCO; prints figures.
stress: setup
	$(BIN)/python -m pytest -m stress --capture=no

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

clean:
	rm -rf $(VENV) build output *.egg-info
