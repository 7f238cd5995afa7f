# make env | demo | test | lint | types | wheel | sbom | site | next-vllm | clean;
# `make help` explains each.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

# python3.11 is what the lock files were made for, so it is tried first.
PYTHON ?= $(shell for p in python3.11 python3; do \
	"$$p" -c '' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST_ARGS ?=
# At a time; tests/dealing.py says which of them runs what. A GPU's memory is for one.
TEST_PROCESSES ?= $(if $(filter cuda,$(DEVICE)),1,2)

# cuda where a GPU answers, cpu elsewhere; `make DEVICE=cpu ...` overrides.
DEVICE ?= $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo cuda || echo cpu)
# The newest of TESTED_VLLM (vllm_dlm/plugin.py).
CUDA_VLLM := vllm==0.33.0

# A stamp is named after what it was made from: a changed lock file makes a new one.
checksum = $(shell cat $(1) 2>/dev/null | cksum | cut -d' ' -f1)
STAMPS := $(VENV)/stamps
METADATA := packaging/vllm-metadata/pyproject.toml
VLLM_STAMP := $(STAMPS)/vllm-$(DEVICE)-$(call checksum,requirements/cpu.lock $(METADATA))
PACKAGE_STAMP := $(STAMPS)/package-$(call checksum,pyproject.toml)
DEV_STAMP := $(STAMPS)/dev-$(call checksum,requirements/dev.lock)

# Shows pip as one line per package; $(VENV)/install.log keeps everything it said.
define run_pip
run_pip() {
  $(PIP) install --progress-bar off "$$@" 2>&1 | tee -a $(VENV)/install.log \
    | awk -v total="$${total:-0}" '
        ($$1 == "Collecting" || $$1 == "Processing") && !seen[$$2]++ {
          name = $$2; sub(/\/$$/, "", name); sub(/.*\//, "", name)
          if (total) printf "  %3d/%d  %s\n", ++n, total, name
          else print "        " name
        }
        /^Requirement already satisfied/ { n++ }
        $$1 == "Downloading" && /\([0-9.]+ [MG]B\)/ {
          gsub(/[()]/, ""); if ($$NF == "GB" || $$(NF-1) > 30)
            print "           downloading " $$(NF-1) " " $$NF
        }
        /^Installing collected/ { print "        installing" }
        { fflush() }' || {
    echo; tail -n 15 $(VENV)/install.log; echo
    echo "pip failed: the end of $(VENV)/install.log is above." >&2
    return 1
  }
}
endef

.PHONY: help env tcmalloc dev demo test test-slow gpu-check lint format types wheel sbom site \
	next-vllm clean

help:
	@cat <<-'TEXT'
	make env        make .venv: the CUDA vLLM where a GPU answers, the CPU one elsewhere
	make demo       serve the built-in models, ask them over HTTP, compare strategies
	make test       the fast tests       (PYTEST_ARGS="-k threshold" passes arguments on)
	make test-slow  the tests marked slow
	make gpu-check  on a GPU, in 8 minutes: tests, graphs, launches, bandwidth, tokens/s
	make lint       ruff check, ruff format --check, hadolint
	make format     let ruff rewrite what lint would complain about
	make types      mypy
	make wheel      build sdist and wheel, check them, try the wheel in an environment of
	                its own
	make sbom       a bill of materials (CycloneDX) of requirements/cpu.lock, in dist
	make site       the documentation as a site, in site; a broken link is an error
	make next-vllm VERSION=X.Y.Z   a set of tests on a vLLM without a CPU wheel: its Python
	                files over the CPU wheel in .venv  (SUITES="kernels ray", ENV_ONLY=1)
	make clean      remove .venv and everything built
	DEVICE=cpu or DEVICE=cuda overrides the detection, PYTHON=... names the interpreter.
	TEXT

env: $(VLLM_STAMP) $(PACKAGE_STAMP) tcmalloc

# A CPU's servers are 5 to 10 % faster with it (docs/performance.md). Each time: the
# library may have been installed, or removed, since.
tcmalloc: $(PACKAGE_STAMP)
ifneq ($(DEVICE),cuda)
	@$(BIN)/python -m vllm_dlm.cli.tcmalloc
endif

dev: env $(DEV_STAMP)

$(BIN)/python:
	@if [[ -z "$(PYTHON)" ]]; then
	  echo "No python3 found. vllm-dlm needs Python 3.11 or newer:" \
	    "install it, or name one with 'make PYTHON=/path/to/python3 ...'." >&2
	  exit 1
	fi
	"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and
	  f"vllm-dlm needs Python 3.11 or newer, and {sys.executable} is "
	  f"{v[0]}.{v[1]}: name another with make PYTHON=/path/to/python3")'
	"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || {
	  echo "$(PYTHON) cannot make virtual environments: install its venv module" \
	    "(on Debian and Ubuntu the package python3-venv)." >&2
	  exit 1
	}
	echo "==> making $(VENV) with $$("$(PYTHON)" --version)"
	rm -rf $(VENV)
	"$(PYTHON)" -m venv $(VENV)

$(VLLM_STAMP): | $(BIN)/python
	@$(run_pip)
	mkdir -p $(STAMPS)
	: > $(VENV)/install.log
	if [[ $(DEVICE) == cuda ]]; then
	  echo "==> installing $(CUDA_VLLM) for CUDA"
	  run_pip "$(CUDA_VLLM)"
	else
	  echo "==> installing vLLM for the CPU: some minutes, most of it downloads"
	  torch=$$(sed -n 's/^torch==//p' requirements/cpu.lock)
	  if [[ -n $$($(PIP) download --no-deps --dest $(VENV)/torch "torch==$$torch+cpu" \
	      >> $(VENV)/install.log 2>&1 && echo found) ]]; then
	    run_pip --no-deps $(VENV)/torch/*.whl
	  else
	    echo "    pip finds no CPU build of torch $$torch: the plain one, which" \
	      "brings its CUDA libraries"
	    run_pip "torch==$$torch" --constraint requirements/cpu.lock
	  fi
	  rm -rf $(VENV)/torch
	  total=$$(grep -c '^[^#].*==' requirements/cpu.lock)
	  run_pip --no-deps -r requirements/cpu.lock
	  total=0 run_pip --no-deps --no-build-isolation ./packaging/vllm-metadata
	fi
	rm -f $(STAMPS)/vllm-*
	touch $@

$(PACKAGE_STAMP): $(VLLM_STAMP)
	@$(run_pip)
	echo "==> installing vllm-dlm, editable"
	locked="--no-deps --no-build-isolation"
	[[ $(DEVICE) == cuda ]] && locked=
	run_pip $$locked -e .
	rm -f $(STAMPS)/package-*
	touch $@

$(DEV_STAMP): $(VLLM_STAMP)
	@$(run_pip)
	echo "==> installing the development tools"
	total=$$(grep -c '^[^#].*==' requirements/dev.lock)
	run_pip --no-deps -r requirements/dev.lock
	rm -f $(STAMPS)/dev-*
	touch $@

demo: env
	@$(BIN)/python -m vllm_dlm.cli.demo

test: dev
	@$(BIN)/python -m pytest -n $(TEST_PROCESSES) $(PYTEST_ARGS)

test-slow: dev
	@$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# GPU_CHECK_ARGS="--parts steps speed --quick"
gpu-check: dev
	@$(BIN)/python -m benchmarks.gpu_check $(GPU_CHECK_ARGS)

lint: dev
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint docker/Dockerfile.*

format: dev
	@$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: dev
	@$(BIN)/mypy

# Tools that need no vLLM, in environments of their own: .release-venv, .site-venv.
.%-venv: requirements/%.lock
	@echo "==> making $@"
	rm -rf $@
	"$(PYTHON)" -m venv $@
	$@/bin/python -m pip install -q --disable-pip-version-check --no-deps -r $< || {
	  rm -rf $@; exit 1; }
	touch $@

# The wheel is built from the sdist, so the sdist is complete. The new environment sees
# the packages of .venv, but not the editable vllm-dlm in it: a path added by a .pth file
# does not have its own .pth files read.
wheel: dev .release-venv
	@rm -rf dist build .wheel-venv
	echo "==> building"
	$(BIN)/python -m build --no-isolation . > $(VENV)/build.log 2>&1 || {
	  tail -n 20 $(VENV)/build.log; exit 1; }
	ls -lh dist/* | awk '{ print "    " $$NF, $$5 }'
	.release-venv/bin/twine check --strict dist/*
	missing=$$(comm -23 \
	  <(find vllm_dlm LICENSE THIRD-PARTY.md -type f -not -path '*/__pycache__/*' | sort) \
	  <($(BIN)/python -m zipfile -l dist/*.whl | awk '{ print $$1 }' \
	    | sed 's,.*dist-info/licenses/,,' | sort))
	if [[ -n "$$missing" ]]; then
	  echo "Not in the wheel:" $$missing >&2
	  exit 1
	fi
	echo "==> trying it in an environment of its own"
	$(BIN)/python -m venv .wheel-venv
	site=$$(.wheel-venv/bin/python -c 'import sysconfig as s; print(s.get_path("purelib"))')
	$(BIN)/python -c 'import sysconfig as s; print(s.get_path("purelib"))' > $$site/base.pth
	.wheel-venv/bin/python -m pip install -q --disable-pip-version-check --no-deps dist/*.whl
	bin=$$PWD/.wheel-venv/bin
	scratch=$$(mktemp -d)
	trap 'rm -rf "$$scratch"' EXIT
	awk '/^```python/ { inside = 1; next } inside && /^```/ { exit } inside' \
	  README.md > "$$scratch/example.py"
	cd "$$scratch"
	$$bin/python -c 'import vllm_dlm as m; assert ".wheel-venv" in m.__file__, m.__file__
	from importlib.resources import files
	model = files(m) / "assets/llada-tiny/config.json"
	assert model.is_file(), f"{model} is not in the wheel"'
	$$bin/vllm-dlm strategies
	$$bin/vllm-dlm doctor
	echo "==> the README's offline example, with the wheel"
	VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR \
	  $$bin/python example.py 2> example.log || {
	  tail -n 40 example.log; exit 1; }
	echo "==> the wheel works"

sbom: .release-venv
	@mkdir -p dist
	.release-venv/bin/cyclonedx-py requirements requirements/cpu.lock \
	  --pyproject pyproject.toml --output-reproducible --output-file dist/vllm-dlm-cpu.cdx.json
	echo "dist/vllm-dlm-cpu.cdx.json: $$(grep -c '"purl"' dist/vllm-dlm-cpu.cdx.json) packages"

# The pages lie in a copy of their folders, as a site must lie below one folder.
site: .site-venv
	@rm -rf build/pages
	mkdir -p build/pages
	cp -r *.md docs examples LICENSE build/pages
	cp --parents benchmarks/README.md build/pages
	NO_MKDOCS_2_WARNING=1 .site-venv/bin/mkdocs build --strict
	echo "site/index.html: $$(find site -name '*.html' | wc -l) pages"

# .ci/next_vllm.py says what it makes, and what it can and cannot show.
next-vllm: dev
	@if [[ -z "$(VERSION)" ]]; then
	  echo "Name a released vLLM: make next-vllm VERSION=X.Y.Z" >&2
	  exit 1
	fi
	$(BIN)/python .ci/next_vllm.py "$(VERSION)" --jobs $(TEST_PROCESSES) \
	  $(if $(SUITES),--suites $(SUITES)) $(if $(ENV_ONLY),--env-only) \
	  --pytest-args="$(PYTEST_ARGS)"

clean:
	@rm -rf $(VENV) .wheel-venv .release-venv .site-venv .next-vllm-*
	rm -rf dist build site packaging/vllm-metadata/build
	find . -name '*.egg-info' -prune -exec rm -rf {} +
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@echo "clean"
