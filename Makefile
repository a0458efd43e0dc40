# `make demo` and `make test` do everything on a fresh machine that has Python 3.11 or newer and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MINUTES ?= 1
PYTEST_ARGS ?= -q -n auto --dist worksteal
ZOO_ARGS ?=
BACKENDS ?= onnxruntime openvino reference tape
# Converters of these take seconds a model: a part of the suite, about a minute each.
SLOW_BACKENDS ?= tensorrt tflite tflite-channel-last tflite-micro
SLOW_CHECKS ?= contract errors determinism leaks batch precision numerics.conv numerics.depthwise numerics.gemm \
  numerics.attention-block legality.computed-operands legality.unknown-operator isolation.lower measurement profile
PLUGIN := out/backend_plugin

.PHONY: help demo test slow check lint format conformance bench zoo clean

help:
	@echo "make demo    install, train a small network on real digits, fit it to half its latency, write out/digits"
	@echo "make test    install, run the tests"
	@echo "make slow    the tests that make test leaves out because they take ten seconds each"
	@echo "make check   ruff, mypy and the tests"
	@echo "make conformance  install, put every backend and the sample plugin through the conformance kit: the fast ones"
	@echo "             through all of it (BACKENDS='...'), the others through a part (SLOW_BACKENDS, SLOW_CHECKS)"
	@echo "make bench   install, run the benchmarks (minutes; wants an otherwise idle machine)"
	@echo "make zoo     install, prune every architecture of timm and torchvision, write out/zoo.json (an hour)"
	@echo "             ZOO_ARGS='--compare torch-pruning' runs Torch-Pruning beside it"
	@echo "make clean   remove everything that make created here"

# pip is the last thing that venv writes: an interrupted creation is repaired by the next make.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Sartor needs Python 3.11 or newer; '$(PYTHON)' is not. Name one: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# One stamp per extra: changed requirements reinstall, an interrupted install starts again.
$(VENV)/.installed-%: $(BIN)/pip pyproject.toml constraints.txt
	@echo "installing what '$*' needs into $(VENV): a minute or more, up to several gigabytes"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[$*]'
	@touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/digits/demo.py --minutes $(MINUTES)

# As many processes as processors, so one thread in each.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) -m 'not slow'

# A dozen tests that take ten seconds each, on whole machines, fits and clusters.
slow: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) -m slow

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The sample plugin goes to a folder of its own: installed into VENV, every test would find one backend more.
conformance: $(VENV)/.installed-test
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --no-index \
	  --upgrade --target $(PLUGIN) ./examples/backend_plugin
	@set -e; for name in $(BACKENDS); do \
	  PYTHONPATH=$(PLUGIN) $(BIN)/python -m sartor conformance $$name; done
	@set -e; for name in $(SLOW_BACKENDS); do \
	  $(BIN)/python -m sartor conformance $$name $(SLOW_CHECKS:%=--only %); done

bench: $(VENV)/.installed-bench
	@mkdir -p out
	$(BIN)/python benchmarks/overhead.py --json out/overhead.json

zoo: $(VENV)/.installed-bench
	@mkdir -p out
	$(BIN)/python benchmarks/zoo.py --json out/zoo.json $(ZOO_ARGS)

clean:
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	rm -f examples/*/model.onnx examples/*/model.safetensors examples/digits/.trained
