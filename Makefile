# make demo and make test do all their set-up on a machine that has make and Python 3.11 or newer.
#   PYTHON       the interpreter the environment is made from      (default: the first one new enough)
#   VENV         where the environment goes; make owns that folder (default: .venv; no spaces)
#   PYTEST_ARGS  what pytest is given                              (default: -n 2 --dist worksteal)

SHELL = /bin/sh
VENV ?= .venv
PYTHON ?=
PYTEST_ARGS ?= -n 2 --dist worksteal

py = $(VENV)/bin/python
demo_ready = $(VENV)/.ready-demo
test_ready = $(VENV)/.ready-test
frameworks_ready = $(VENV)/.ready-frameworks
unfinished = $(VENV).unfinished

# After an interrupted install, or once the interpreter has gone, nothing is ready whatever the
# stamps say.
ignored := $(shell { test ! -e "$(unfinished)" && "$(py)" -c "" 2>/dev/null; } \
                   || rm -f "$(demo_ready)" "$(test_ready)" "$(frameworks_ready)")

.PHONY: help demo test test-slow test-frameworks lint types clean
.NOTPARALLEL:

help:
	@echo "make demo       meta-train and evaluate in miniature, on the CPU; writes runs/demo"
	@echo "make test       run the tests (slow ones left out)"
	@echo "make test-slow  run the slow tests alone"
	@echo "make test-frameworks  run the examples of training frameworks (docs/frameworks.md)"
	@echo "make lint       ruff"
	@echo "make types      mypy"
	@echo "make clean      remove the environment and the caches (runs/ stays)"
	@echo "PYTHON=<interpreter>, VENV=<folder> and PYTEST_ARGS=<arguments> can be set."

demo: $(demo_ready)
	"$(py)" -m meta_train demo --out runs/demo

# Two processes with one thread each: the tensors of the tests are too small to share. Each begins with a half of the tests
# in order, so that what the tests of a file share is made once.
test: $(test_ready)
	OMP_NUM_THREADS=1 "$(py)" -m pytest $(PYTEST_ARGS)

test-slow: $(test_ready)
	OMP_NUM_THREADS=1 "$(py)" -m pytest $(PYTEST_ARGS) -m slow

test-frameworks: $(frameworks_ready)
	OMP_NUM_THREADS=1 "$(py)" -m pytest -m frameworks

lint: $(test_ready)
	"$(py)" -m ruff check .

types: $(test_ready)
	"$(py)" -m mypy

# Only what make has built: a folder that is no virtual environment is left alone.
clean:
	@if [ -e "$(VENV)/pyvenv.cfg" ] || [ -e "$(unfinished)" ]; then rm -rf "$(VENV)" "$(unfinished)"; fi
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find learned_opt tasks meta_train tests experiments -name __pycache__ -type d -prune -exec rm -rf {} +

$(demo_ready): extras = meta
$(test_ready): extras = dev,vision
$(frameworks_ready): extras = dev,vision,frameworks
$(demo_ready) $(test_ready) $(frameworks_ready): pyproject.toml
	$(install)

# Install this project, editable and with $(extras), then stamp the target.
# The mark <VENV>.unfinished stands while pip is at work. One that is still there belongs to an
# install that was cut short and may have left half a package, which pip would take for a whole
# one: start afresh.
define install
@set -e; \
if [ -e "$(unfinished)" ]; then \
  echo "The last install into $(VENV) was cut short: making it anew."; \
  rm -rf "$(VENV)"; \
fi; \
if ! "$(py)" -m pip --version >/dev/null 2>&1; then \
  if [ -d "$(VENV)" ] && [ ! -e "$(VENV)/pyvenv.cfg" ] && [ -n "$$(ls -A "$(VENV)")" ]; then \
    echo "$(VENV) exists and is no virtual environment. Name another folder: make VENV=<folder>" >&2; \
    exit 1; \
  fi; \
  set -- python3 python python3.13 python3.12 python3.11 python3.14; \
  if [ -n "$(PYTHON)" ]; then set -- "$(PYTHON)"; fi; \
  base=; \
  for candidate in "$$@"; do \
    if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
        >/dev/null 2>&1; then base=$$candidate; break; fi; \
  done; \
  if [ -z "$$base" ]; then \
    echo "No Python 3.11 or newer with its venv module was found. Tried: $$*." >&2; \
    for candidate in "$$@"; do \
      version=$$("$$candidate" --version 2>&1) && echo "  $$candidate is $$version" >&2 || :; \
    done; \
    echo "Install one (on Debian and Ubuntu also the package python3-venv)," >&2; \
    echo "or name it: make PYTHON=<path of python3.11 or newer>" >&2; \
    exit 1; \
  fi; \
  : > "$(unfinished)"; \
  rm -rf "$(VENV)"; \
  "$$base" -m venv "$(VENV)"; \
fi; \
: > "$(unfinished)"; \
echo "Installing .[$(extras)] into $(VENV); torch is large, this can take minutes."; \
"$(py)" -m pip install --disable-pip-version-check --no-input --editable ".[$(extras)]"; \
touch "$@"; \
rm -f "$(unfinished)"
endef
