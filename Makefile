# Each target sets up what it needs; `make` alone lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# gpu where an NVIDIA driver answers, else cpu; once chosen it stays, for the two exclude each other in one environment.
DEVICE := $(or $(shell cat $(VENV)/device 2>/dev/null),$(if $(shell nvidia-smi -L 2>/dev/null),gpu,cpu))
TARGET := cpu
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup serve train test lint bench image clean browser

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-7s %s\n", $$1, $$2}'

serve: $(VENV)/serving  ## serve the models in models/ on port 8000
	$(BIN)/foldserve serve

setup: $(VENV)/everything  ## set up everything: training, inspect, import, the tests

train: $(VENV)/everything  ## train, fold, export and check a model on the bundled digits, without a network
	$(BIN)/foldserve train digits --out runs/digits --overwrite
	$(BIN)/foldserve export runs/digits --name digits

test: $(VENV)/everything browser  ## run all tests
	$(BIN)/pytest

browser:  # for the tests of the page; Debian's package, where this user may install it
	@command -v chromium >/dev/null || (apt-get update -qq && apt-get install -qq -y chromium >/dev/null) || \
	  echo "SKIPPED: no chromium here and no right to install it; the tests of the page will be skipped" >&2

lint: $(VENV)/everything  ## ruff, mypy strict, the boundaries between the packages, the Dockerfile
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports && $(BIN)/hadolint Dockerfile

image:  ## build the container image TARGET=cpu (or gpu, train); WHEELS=FOLDER has wheels that go before others
	docker build --target $(TARGET) --tag foldserve:$(TARGET) $(if $(WHEELS),--build-context wheels=$(WHEELS)) \
	  --label org.opencontainers.image.version=$(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' foldserve/__init__.py) \
	  --label org.opencontainers.image.revision=$(shell git rev-parse HEAD 2>/dev/null) .

bench: $(VENV)/everything  ## measure the service on this machine
	$(BIN)/python -m benchmarks.serve

clean:  ## remove the environment, the runs and the caches; models stay
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info

$(VENV)/serving: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "foldserve needs Python 3.11 or newer, this is " + sys.version)'
	@echo 'setting up $(VENV) for serving on the $(DEVICE)'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable '.[$(DEVICE)]'
	@echo $(DEVICE) > $(VENV)/device && touch $@

$(VENV)/everything: $(VENV)/serving
	@echo 'adding what training and the tests need'
	@$(PIP) --editable '.[$(DEVICE),train,dev]'
	@touch $@
