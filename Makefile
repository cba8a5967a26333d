# Two commands set everything up on a fresh Debian machine with a Swift toolchain: make demo, make test.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CLIENT := Sources/PythonClient
DAEMON := .build/release/noether-writerd
export NOETHER_WRITER_DAEMON := $(CURDIR)/$(DAEMON)
export PYTHONPATH := $(CURDIR)/$(CLIENT)

.PHONY: demo test test-swift test-python test-noether lint build system clean

demo: build $(VENV)/ready
	$(PY) Tests/EndToEnd/demo.py

test: lint test-swift test-python

# Header packages, only where they are missing.
system:
	@if ! { [ -e /usr/include/systemd/sd-daemon.h ] && [ -e /usr/include/libdeflate.h ] && command -v unzip >/dev/null; }; then \
	    sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	    $$sudo apt-get update -qq && $$sudo apt-get install -y -qq libsystemd-dev libdeflate-dev unzip; \
	fi

build: system
	swift build -c release

$(VENV)/ready: Makefile
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check 'torch==2.13.*' numpy pytest ruff mypy
	touch $@

test-swift: system
	swift test

test-python: build $(VENV)/ready
	$(PY) -m pytest -q Tests/EndToEnd

lint: $(VENV)/ready
	swift format lint --strict --recursive Package.swift Sources Tests
	$(VENV)/bin/ruff check --config $(CLIENT)/pyproject.toml $(CLIENT) Tests
	$(VENV)/bin/ruff format --check --config $(CLIENT)/pyproject.toml $(CLIENT) Tests
	cd $(CLIENT) && ../../$(VENV)/bin/mypy noether_writer

# The real Noether package, each version in an environment of its own: it needs Python 3.12 and pins a CUDA torch, some
# 7 GB each. Not a part of `make test`.
PYTHON312 ?= python3.12
NOETHER_VERSIONS := 2.0.0 2026.4.0

test-noether: build $(NOETHER_VERSIONS:%=.venv-noether-%/ready)
	@for version in $(NOETHER_VERSIONS); do \
	    echo "emmiai-noether $$version"; \
	    .venv-noether-$$version/bin/python -m pytest -q -rs Tests/Noether || exit 1; \
	done

.venv-noether-%/ready: Makefile
	$(PYTHON312) -m venv .venv-noether-$*
	.venv-noether-$*/bin/pip install -q --disable-pip-version-check emmiai-noether==$* pytest
	touch $@

clean:
	rm -rf .build $(VENV) .venv-noether-*
