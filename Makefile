# make quickstart   train, evaluate and try a T5 on the embedded text (10 minutes on 2 cores)
# make test         the tests, whole trainings and restarts included
# make test-quick   the tests without those that take long
# make lint         formatter, linter, types, import floors, spelling
# make audit        known vulnerabilities of what is locked, where PyPI's data can be had
# make docs         the site of docs/, into .cache/docs
# make lock         renew requirements.lock (needs Python 3.11)

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := -m pip install -qq --disable-pip-version-check
# Tests spend their time in compilers that take a core each; more workers than
# cores only cost memory (about 3 GB each, most of it TensorFlow and torch).
WORKERS ?= 2
PYTEST_ARGS ?=
# requirements.lock has two sections: what the programs need, and what tests,
# linters, parity oracles and TPU compiles need on top. The environment is built
# anew when the lock changes, the package installed anew when its metadata does.
checksum = $(shell cat $(1) | cksum | cut -d' ' -f1)
RUN := $(VENV)/.run-$(call checksum,requirements.lock)-$(call checksum,pyproject.toml setup.py)
DEV := $(RUN)-dev

.PHONY: quickstart test test-quick lint audit docs lock env clean

# Two devices of one thread each use two cores better than one device of two, and
# large pages spare the kernel from clearing small ones in every step.
quickstart: $(RUN)
	JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2 GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
	  $(BIN)/t5x-lite quickstart --gin_file=configs/experiments/quickstart.gin

PYTEST := PATH="$(abspath $(BIN)):$$PATH" python -m pytest -n $(WORKERS) --dist=loadfile \
  --no-loadscope-reorder

test: $(DEV)
	$(PYTEST) $(PYTEST_ARGS)

test-quick: $(DEV)
	$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports
	$(BIN)/codespell

# In an environment of its own: it is no part of what it looks at.
# An index that has nothing on a release of 2020 with known faults has no advisories.
AUDIT := .cache/audit
PIP_AUDIT := $(AUDIT)/bin/pip-audit --disable-pip --no-deps --timeout 10
audit:
	@rm -rf $(AUDIT) && $(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/python $(PIP_INSTALL) pip-audit
	@echo 'urllib3==1.26.0' > $(AUDIT)/control; \
	if $(PIP_AUDIT) -r $(AUDIT)/control -f json -o $(AUDIT)/report 2> /dev/null || [ ! -s $(AUDIT)/report ]; \
	then echo 'audit: left out, advisories cannot be had here'; else $(PIP_AUDIT) -r requirements.lock; fi

docs: $(DEV)
	$(BIN)/sphinx-build -W --keep-going -q docs .cache/docs

env: $(DEV)

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 't5x_lite needs Python 3.11 or newer: make PYTHON=/path/to/python3.11'; exit 1; }
	@case "$$(ls -d $(VENV)/.run-$(call checksum,requirements.lock)-* 2>/dev/null)" in \
	  '') rm -rf $(VENV) && $(PYTHON) -m venv $(VENV);; esac
	@echo 'installing, about 2 minutes'
	sed '/^# Tests/,$$d' requirements.lock > $(VENV)/run.lock
	$(BIN)/python $(PIP_INSTALL) -r $(VENV)/run.lock
	$(BIN)/python $(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	touch $@

$(DEV): $(RUN)
	$(BIN)/python $(PIP_INSTALL) -r requirements.lock
	touch $@

# torch and transformers are held at what the parity tests were written against. The
# CUDA packages it brings along from PyPI are no part of the lock: for a small
# environment install torch's CPU build.
LOCK := .cache/lock
FREEZE := $(LOCK)/bin/python -m pip freeze --all | \
  grep -vE '^(pip|t5x_lite|nvidia-.*|cuda-.*|triton)( @|==)' | sed 's/+cpu$$//'
lock:
	rm -rf $(LOCK)
	$(PYTHON) -m venv $(LOCK)
	$(LOCK)/bin/python $(PIP_INSTALL) --upgrade setuptools .
	$(FREEZE) > $(LOCK)/run
	$(LOCK)/bin/python $(PIP_INSTALL) -c $(LOCK)/run '.[dev,docs,hf,tpu,wandb]' torch==2.13.0 transformers==5.23.0
	{ echo '# Exact versions for Python 3.11 on CPU, written by `make lock`.'; \
	  cat $(LOCK)/run; \
	  echo '# Tests, linters, parity oracles, TPU compiles.'; \
	  $(FREEZE) | grep -vxFf $(LOCK)/run; } > requirements.lock
	rm -rf $(LOCK) build

clean:
	rm -rf $(VENV) .cache build dist
