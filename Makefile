# SPDX-License-Identifier: BSD-3-Clause
# Every verb sets up what it needs: .venv with the pinned packages, and the native library, with
# its CUDA kernels where PyTorch is a CUDA build, nvcc is found and a GPU is here, or where
# MASKED_LOSS_EXT_CUDA=1 asks for them. Done once, renewed when needed.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
ARGS ?=
RANKS ?= 2
# The tests run in so many processes, each with one thread.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -le 8 ] || n=8; echo $$n)

.DEFAULT_GOAL := help
.PHONY: help setup build demo ranks examples test places docs matrix compilers aarch64 mutate fuzz sanitize coverage bench gpu lint dist clean

help:
	@echo "make demo       train on photographs and on texts; ARGS='--acts tokenizer' is one act    ~ 5 min"
	@echo "make ranks      train on two processes, beside one; ARGS='--steps 20', RANKS=4          ~ 20 s"
	@echo "make test       the whole test suite; ARGS='-k padding' picks some                      ~ 25 min"
	@echo "make examples   each of examples/ in its quick form, and what it prints checked          ~ 2 min"
	@echo "make places     TRL, Lightning, axolotl, torchtitan, verl: the tests beside each         ~ 4 min"
	@echo "make bench      the losses against eager and compiled PyTorch; ARGS=cross_entropy one   ~ 26 min"
	@echo "make docs       the site, in build/docs/html; ARGS=--check opens each page in Chromium    ~ 1 min"
	@echo "make gpu        all that a machine with a GPU can tell; ARGS=--dry-run says what that is ~ 8 min"
	@echo "make lint       ruff, mypy and the repository's own checks                              ~ 10 s"
	@echo "make build      .venv and the native library alone; MASKED_LOSS_EXT_CUDA=1|0            ~ 35 s"
	@echo "make dist       source archive and one wheel for all, checked, tried; with CUDA: 5 min  ~ 1 min"
	@echo "make clean      remove all that these made, .venv too"
	@echo "Beyond the tests (CONTRIBUTING.md; what came of them is in docs/trust.md):"
	@echo "make fuzz       random calls against the reference; ARGS='--seconds 60 --only terms'    until Ctrl-C"
	@echo "make sanitize   the library and its tests under the sanitizers; ARGS=--short: 3 min     ~ 15 min"
	@echo "make mutate     wrong lines, one at a time: which test says so; ARGS='--only 7' one     ~ 2 h"
	@echo "make matrix     one wheel under each Python and each PyTorch; ARGS='--only NAME' one    ~ 1 h"
	@echo "make compilers  the library by every gcc and clang here, and the numbers with each      ~ 20 min"
	@echo "make aarch64    the numbers on an aarch64 that qemu imitates; ARGS=--short              ~ 15 min"
	@echo "make coverage   which lines of Python, C++ and CUDA the tests run; ARGS picks tests     ~ 40 min"
	@echo "The first one also makes .venv from requirements.txt: 1 to 10 minutes of installing."
	@echo "Variables: PYTHON=python3.12 (the interpreter of .venv), ARGS (passed on), RANKS, MAX_JOBS, WORKERS."

$(PY):
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: install Python 3.10 or newer, or say make PYTHON=..."; exit 1; }
	@$(PYTHON) -c '' 2>/dev/null || { echo "$(PYTHON) is there but does not start (as a shim of pyenv whose version is not chosen): make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed, $(PYTHON) is older: make PYTHON=python3.12"; exit 1; }
	@echo "[1/3] making $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "venv or pip of $(PYTHON) is missing: apt-get install python3-venv"; exit 1; }

$(VENV)/packages: requirements.txt | $(PY)
	@echo "[2/3] installing PyTorch and the other packages of requirements.txt (minutes, the first time)"
	@$(PY) -m tools.installing requirements.txt
	@touch $@

# Only makes the source tree importable; the library itself is compiled by `build`.
$(VENV)/package: pyproject.toml setup.py masked_loss_ext/_version.py $(VENV)/packages
	@echo "[3/3] making the package importable"
	@MASKED_LOSS_EXT_BUILD=jit $(PY) -m pip install -qq --disable-pip-version-check \
	  --no-build-isolation --no-deps --editable .
	@touch $@

setup: $(VENV)/package

# Always asked: ninja knows what changed, and says nothing when nothing did.
build: setup
	@$(PY) setup.py --quiet build_ext --inplace

demo: build
	@$(PY) examples/demo.py $(ARGS)

# Each by torchrun, as a user starts it.
ranks: build
	@for example in ddp fsdp2 tensor_parallel; do OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone \
	  --nproc-per-node $(RANKS) examples/$$example.py $(ARGS) || exit 1; done

test: build
	@$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# By CXX for the C++ programs, in one word: g++ if nothing is said.
examples: build
	@$(PY) -m pytest -n $(WORKERS) -m examples tests/examples $(ARGS)

# Packages that only these tests need, away from .venv and on top of it.
PLACES := build/places
TRIED := trl lightning axolotl torchtitan verl
$(PLACES)/packages: tests/integrations/requirements.txt $(VENV)/package
	@echo "installing $(TRIED) (700 MB, a minute or two)"
	@rm -rf $(PLACES) && $(PY) -m venv --without-pip $(PLACES)
	@$(PY) -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
	  > $$(echo $(PLACES)/lib/python*/site-packages)/below.pth
	@$(PY) -m pip --python $(PLACES)/bin/python install -qq --disable-pip-version-check --no-deps \
	  --no-build-isolation -r $<
	@touch $@

places: build $(PLACES)/packages
	@REQUIRE_PLACES=1 $(PLACES)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
	  $(TRIED:%=tests/integrations/test_%.py) $(ARGS)

# In a copy of the tree; stopped and started again it goes on where it was.
mutate: setup
	@$(PY) -m tools.mutation $(ARGS)

# Each environment is downloaded, used and removed again; docs/trust/matrix.csv has what came of it.
matrix: dist
	@$(PY) -m tools.matrix $(ARGS)

compilers: setup
	@$(PY) -m tools.compilers $(ARGS)

aarch64: setup
	@$(PY) -m tools.aarch64 $(ARGS)

# The properties of tests/fuzz, fresh seeds; ARGS=--help.
fuzz: build
	@$(PY) -m tools.fuzz $(ARGS)

# They compile libraries of their own, and leave the one of `build` alone.
sanitize: setup
	@$(PY) -m tools.sanitize $(ARGS)

$(VENV)/coverage: tools/coverage/requirements.txt $(VENV)/packages
	@$(PY) -m pip install -qq --disable-pip-version-check -r $<
	@touch $@

coverage: setup $(VENV)/coverage
	@$(PY) -m tools.coverage $(ARGS)

$(VENV)/docs: docs/requirements.txt $(VENV)/packages
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make docs needs Python 3.11 or newer in $(VENV)"; exit 1; }
	@$(PY) -m pip install -qq --disable-pip-version-check -r $<
	@touch $@

# --check wants chromium and chromium-driver; --screenshots, --serve: ARGS=--help.
docs: build $(VENV)/docs
	@$(PY) -m tools.site $(ARGS)

# ARGS may begin with the name of a benchmark; switches alone are for all of them.
bench: build
	@$(PY) -m benchmarks $(if $(filter-out -%,$(firstword $(ARGS))),,all) $(ARGS)

# Installs nothing: the Python of .venv where there is one, else PYTHON with what it has.
gpu:
	@$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m tools.gpu $(ARGS)

lint: $(VENV)/packages
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/ruff format --check --quiet . || { echo "not formatted: $(VENV)/bin/ruff format ."; exit 1; }
	@$(PY) .ci/check_text.py
	@$(PY) -m mypy

# Checked by twine and auditwheel, installed into clean environments; MASKED_LOSS_EXT_CUDA=0|1.
dist: build
	@$(PY) -m tools.dist

clean:
	rm -rf $(VENV) build dist *.egg-info masked_loss_ext/*.so demo_output .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
