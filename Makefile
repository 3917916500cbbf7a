# SPDX-License-Identifier: GPL-2.0-or-later
# `make` or `make help` lists the targets. Everything happens in ./.venv.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# What the tests need from Debian: a cross compiler for guests/, dtc for device trees, QEMU for the
# test bed, and what builds the kernel in guests/linux, which the benchmarks need too, beside QEMU.
KERNEL_PACKAGES := bc bison flex gcc-aarch64-linux-gnu libc6-dev xz-utils
DEBIAN_PACKAGES := binutils-aarch64-linux-gnu device-tree-compiler e2fsprogs passt \
	qemu-system-arm $(KERNEL_PACKAGES)
BENCH_PACKAGES  := qemu-system-arm $(KERNEL_PACKAGES)
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help run linux test lint unit bench guests packages clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/pkvm: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.dev: $(BIN)/pkvm pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

run: $(BIN)/pkvm  ## set up, then run the demonstration as a protected VM (ARGS='--json')
	@$(BIN)/pkvm run $(ARGS)

linux: $(BIN)/pkvm  ## fetch a stock Debian kernel and boot it as a protected VM, to a shell
	@kernel=$$($(BIN)/python -m pkvm.testbed.debian --kernel 7.3) && \
	initrd=$$($(BIN)/python -m pkvm.testbed.initramfs) && \
	$(BIN)/pkvm run --kernel "$$kernel" --initrd "$$initrd" --append console=ttyAMA0 $(ARGS)

test: packages lint unit  ## set up, then lint, type-check and test everything

lint: $(VENV)/.dev  ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(VENV)/.dev  ## pytest alone (ARGS='tests/hyp -x')
	$(BIN)/pytest $(ARGS)

bench: $(BIN)/pkvm  ## side-by-side measurements: name, ratio, bound, ok (JSON=1 for one JSON list)
	@$(MAKE) --no-print-directory packages DEBIAN_PACKAGES='$(BENCH_PACKAGES)' >&2 || true
	@$(BIN)/python -m compileall -q src
	@$(BIN)/python benchmarks/run.py $(if $(JSON),--json) $(ARGS)

guests: packages  ## rebuild the guest programs that ship in the package
	$(MAKE) -C guests install

packages:
	@missing=; for package in $(DEBIAN_PACKAGES); do \
	  dpkg-query -W -f '$${Status}' $$package 2>/dev/null | grep -q 'ok installed' \
	    || missing="$$missing $$package"; \
	done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ]; then \
	  echo "missing Debian packages:$$missing"; \
	  echo "install them (as root: apt-get install$$missing) or run this target as root"; exit 1; \
	fi; \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing

clean:  ## remove the virtual environment and build products
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	$(MAKE) -C guests clean
