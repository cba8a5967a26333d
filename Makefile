# SPDX-License-Identifier: Apache-2.0
# Two commands set everything up on a fresh Debian machine with a Swift toolchain: make demo, make test.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# An environment with setuptools alone, which makes wheels.
PACKER := .build/packer
CLIENT := Sources/PythonClient
DAEMON := .build/release/noether-writerd
CORE := $(CLIENT)/noether_writer/_core.abi3.so
FAILING := .build/release/libnoether-writer-failing.so
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
export NOETHER_WRITER_DAEMON := $(CURDIR)/$(DAEMON)
export PYTHONPATH := $(CURDIR)/$(CLIENT)

.PHONY: setup demo test test-swift test-copy test-python test-wheel test-systemd test-noether test-frameworks \
    test-trackers test-torch test-interrupts test-torture test-kills interrupts torture faults simulate simulate-known \
    simulation-finds guards guards-coverage guards-check soak bench bench-gpu fuzz sanitize \
    lint docs build wheel deb rpm image package-root test-packages system system-systemd system-disks system-terminal \
    system-packages install uninstall clean

# torch's threads wait for each other in busy loops: on few processors, beside a daemon and other tests, small tensors
# take minutes.
demo test-python test-kills test-interrupts test-wheel test-torture test-systemd test-frameworks test-trackers \
    test-torch guards guards-coverage: export OMP_NUM_THREADS = 1

demo: build $(VENV)/ready
	$(PY) Tests/EndToEnd/demo.py

test: setup lint docs test-copy test-swift test-python test-interrupts test-wheel test-torture test-systemd \
    simulate-known fuzz

# All that `make test` downloads: packages of the distribution, the Python environment, Swift packages. Only the four
# `system` targets call apt, each only if something of its set is missing; a target that needs a set depends on it.
# APT=no installs nothing: a target that needs what is missing fails, and names the packages.
setup: system system-systemd system-disks system-terminal $(VENV)/ready $(PACKER)/ready
	swift package resolve

APT ?= yes
APT_INSTALL := $(if $(filter no,$(APT)),missing() { echo "install these packages: $$*" >&2; false; }; missing, \
    $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq)

# What the build needs: headers and static libraries.
HEADERS := /usr/include/systemd/sd-daemon.h /usr/include/libdeflate.h /usr/include/yaml.h

system:
	@if ! { ls $(HEADERS) && command -v unzip; } >/dev/null 2>&1; then \
	    $(APT_INSTALL) libsystemd-dev libdeflate-dev libyaml-dev unzip; fi
	@if ! [ -e $(PYTHON_HEADERS)/Python.h ]; then $(APT_INSTALL) python3-dev; fi
	@if ! $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(APT_INSTALL) python3-venv; fi

# What the tests on a real systemd need.
system-systemd: system
	@if ! { command -v dbus-daemon && command -v systemd-analyze && command -v man && \
	    command -v promtool; } >/dev/null; then \
	    $(APT_INSTALL) systemd dbus man-db prometheus; fi

# A terminal without a person, for the tests of what is drawn.
system-terminal:
	@if ! command -v tmux >/dev/null; then $(APT_INSTALL) tmux || echo "no tmux: tests are skipped"; fi

# A FUSE server that can be stopped, for the test of a hung disk; file systems that share blocks; access control lists.
system-disks:
	@if ! { command -v bindfs && command -v mkfs.xfs && command -v mkfs.btrfs && command -v setfacl; } >/dev/null; then \
	    $(APT_INSTALL) bindfs e2fsprogs xfsprogs btrfs-progs acl || \
	        echo "not all file systems are here: tests are skipped"; fi

# With Swift's libraries, libdeflate and libyaml inside: programs that start anywhere, and half the memory of a daemon
# that rests. The linker looks into this folder first, and finds no shared ones there.
STATIC := .build/static
COMPLETIONS := .build/completions

build: system
	mkdir -p $(STATIC)
	for name in deflate yaml; do ln -sf "$$(clang -print-file-name=lib$$name.a)" $(STATIC)/lib$$name.a; done
	swift build -c release --static-swift-stdlib -Xlinker -L$(CURDIR)/$(STATIC)
	$(MAKE) -s $(CORE)
	mkdir -p $(COMPLETIONS)
	for shell in bash zsh fish; do \
	    .build/release/noether-writer completions $$shell > $(COMPLETIONS)/$$shell || exit 1; done

# The Python client's core, in CPython's limited API: one file for 3.10 and newer. Not by SwiftPM, which would make a
# trainer load the Swift runtime for it.
PYTHON_HEADERS = $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')

CORE_SOURCES := $(wildcard Sources/CCopy/*.c $(CLIENT)/core/*.c)
CORE_HEADERS := $(wildcard Sources/CCopy/include/*.h $(CLIENT)/core/*.h)
COMPILE_CORE = clang -O2 -Wall -Wextra -Wno-unused-parameter -Wno-missing-field-initializers -Werror \
    -fvisibility=hidden -fPIC -shared -pthread -I$(PYTHON_HEADERS) -ISources/CCopy/include $(CORE_SOURCES)

$(CORE): $(CORE_SOURCES) $(CORE_HEADERS)
	$(COMPILE_CORE) -o $@.new && mv $@.new $@

# For pip: the programs inside, stripped, linked for older systems, and tagged by the glibc that they need.
STAGE := .build/wheel
LINKED := .build/linked
LINK_FOR_OLDER_SYSTEMS = $(PACKER)/bin/python $(CLIENT)/wheel_link.py .build/release $(STATIC) $(LINKED) \
    noether-writerd noether-writer

# Whoever wants a wheel need not download what the tests need.
$(PACKER)/ready: Makefile | system
	$(PYTHON) -m venv $(PACKER)
	$(PACKER)/bin/python -m pip install -q --disable-pip-version-check 'setuptools>=77' 'ziglang==0.17.*'
	touch $@

wheel: build $(PACKER)/ready
	rm -rf $(STAGE) && mkdir -p $(STAGE) dist
	$(LINK_FOR_OLDER_SYSTEMS)
	cp -rL $(CLIENT)/. $(STAGE) && mkdir -p $(STAGE)/noether_writer/bin
	cp -r config/man $(COMPLETIONS) $(STAGE)
	install -m 755 -s -t $(STAGE)/noether_writer/bin $(LINKED)/noether-writerd $(LINKED)/noether-writer
	$(COMPILE_CORE) -L$(LINKED)/stubs -lpthread -Wl,--strip-all -o $(STAGE)/noether_writer/$(notdir $(CORE))
	rm -f dist/noether_writer-*.whl
	NOETHER_WRITER_WHEEL_PLATFORM=$$($(PACKER)/bin/python $(CLIENT)/wheel_platform.py \
	        $(STAGE)/noether_writer/bin/* $(STAGE)/noether_writer/*.so) \
	    && export NOETHER_WRITER_WHEEL_PLATFORM \
	    && $(PACKER)/bin/python -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w dist \
	        ./$(STAGE)
	@ls -l dist/noether_writer-*.whl

# In a clean environment: the wheel alone, and torch.
test-wheel: wheel $(VENV)/ready
	$(PY) -m pytest -q -rfEs Tests/Wheel

# Makes the n-th call of a function fail, in a daemon that is run with it.
$(FAILING): Tests/Faults/failing.c
	clang -O2 -Wall -Wextra -Werror -fPIC -shared $< -o $@

$(VENV)/ready: Makefile
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check 'torch==2.13.*' numpy pytest ruff mypy 'setuptools>=77' pyyaml \
	    prometheus-client tensorboard pandas pyarrow pdoc torchao omegaconf addict easydict munch ml_collections pydantic
	touch $@

test-swift: system
	swift test

# The C of the Python client under AddressSanitizer and UndefinedBehaviorSanitizer, and under ThreadSanitizer, which in
# Swift's clang needs libdispatch.
SWIFT_LIBRARIES = $(abspath $(shell clang -print-resource-dir)/../../swift/linux)

test-copy:
	mkdir -p .build
	for kind in address,undefined thread; do \
	    clang -O1 -g -Wall -Wextra -Werror -fuse-ld=lld -fsanitize=$$kind -fno-sanitize-recover=all -pthread \
	        -ISources/CCopy/include Sources/CCopy/*.c $(addprefix $(CLIENT)/core/,pool.c session.c json.c) \
	        Tests/CopyTests/*.c -Wl,--wrap=pthread_create -L$(SWIFT_LIBRARIES) -Wl,-rpath,$(SWIFT_LIBRARIES) \
	        -Wl,--as-needed -ldispatch -lBlocksRuntime -o .build/copy-tests && .build/copy-tests || exit 1; \
	done

test-python: build system-disks system-terminal $(VENV)/ready
	$(PY) -m pytest -q -rfEs Tests/EndToEnd --ignore Tests/EndToEnd/test_dcp_kills.py

# Ranks and daemons of sharded saves, killed at each point of the way. Not a part of `make test`: it takes long.
test-kills: build $(VENV)/ready
	$(PY) -m pytest -q -rfEs Tests/EndToEnd/test_dcp_kills.py

# Every call of the Python client interrupted at each of its bytecodes, by an exception or by a handler that logs,
# saves, finishes or closes: all points take hours. Part of `make test` are each 250th point, a storm of signals, and
# how processes end and fork.
SAMPLED ?= 250

interrupts: build $(VENV)/ready
	$(PY) Tests/Interrupts/interrupts.py
	$(PY) Tests/Interrupts/storm.py --seconds 60
	$(PY) -m pytest -q -rfEs Tests/Interrupts

test-interrupts: build $(VENV)/ready
	$(PY) Tests/Interrupts/interrupts.py --every $(SAMPLED)
	$(PY) Tests/Interrupts/storm.py --seconds 20
	$(PY) -m pytest -q -rfEs Tests/Interrupts

# Crash loops and failing syscalls, a short while each; the long ones are `torture`, `faults` and `soak`.
test-torture: build $(FAILING) $(VENV)/ready
	$(PY) Tests/Torture/torture.py --rounds 200 --seconds 60
	$(PY) Tests/Faults/faults.py --every 9 --seconds 60

ROUNDS ?= 1000
SEED_OPTION = $(if $(SEED),--seed $(SEED))

torture: build $(VENV)/ready
	$(PY) Tests/Torture/torture.py --rounds $(ROUNDS) $(SEED_OPTION)

faults: build $(FAILING) $(VENV)/ready
	$(PY) Tests/Faults/faults.py $(SEED_OPTION)

# The daemon's runs with simulated trainers, disk, clock and service manager: everything dies at any step. SECONDS= says
# for how long, SEED= where to begin. The seed of a failure gives the same course of events again.
simulate: build
	.build/release/noether-writer-simulate --seconds $(or $(SECONDS),60) $(SEED_OPTION)

# A part of `make test`: the same worlds each time, so that a change is what makes them fail.
simulate-known: build
	.build/release/noether-writer-simulate --seconds $(or $(SECONDS),60) --seed 1 --worlds 13000

# Whether it notices when guards are taken out.
simulation-finds: build $(VENV)/ready
	$(PY) Tests/Simulator/finds.py

# Each guard (a line with the comment `guard: NAME`) is taken out, in a copy of the sources: a test must fail then.
# GUARDS= picks some; RECORD=yes writes down which test noticed.
guards: system-disks $(VENV)/ready
	$(PY) Tests/Guards/guards.py $(if $(RECORD),--record) $(if $(GUARDS),--only $(GUARDS))

# Which tests come to which guard: Tests/Guards/covered_by.json. COVERED= picks tests; what is known by others stays.
guards-coverage: system-disks system-terminal $(VENV)/ready
	$(PY) Tests/Guards/guards.py --cover $(COVERED)

# Whether each marker, patch and test is right, and each source without its guards parses.
guards-check: $(VENV)/ready
	$(PY) -m pytest -q -p no:cacheprovider Tests/Guards
	$(PY) Tests/Guards/guards.py --check

# The daemon's memory, descriptors and threads over time: .soak/soak.json and .soak/soak.svg.
MINUTES ?= 60

soak: build $(VENV)/ready
	$(PY) Tests/Soak/soak.py --minutes $(MINUTES)

# On a real systemd, in a namespace of its own; says so where that is not possible.
test-systemd: build system-systemd $(VENV)/ready
	Tests/Systemd/in-systemd $(PY) -m pytest -q -rfEs Tests/Systemd

# libFuzzer with AddressSanitizer on every decoder, each for so many seconds.
SECONDS ?= $(if $(CI),60,10)
fuzz: system
	Tests/Fuzz/build .build-fuzz
	Tests/Fuzz/run .build-fuzz $(SECONDS)

# The end-to-end tests with programs under ThreadSanitizer and AddressSanitizer, their C also under
# UndefinedBehaviorSanitizer, and the Swift tests. SANITIZED= picks tests.
SANITIZED ?= Tests/EndToEnd
sanitize: build system-disks system-terminal $(VENV)/ready
	for kind in thread address; do Tests/sanitize $$kind $(SANITIZED) || exit 1; done
	swift test --sanitize=thread --scratch-path .build-tsan
	swift test --sanitize=address --scratch-path .build-asan

lint: $(VENV)/ready
	swift format lint --strict --recursive Package.swift Sources Tests
	$(VENV)/bin/ruff check --config $(CLIENT)/pyproject.toml $(CLIENT) Tests
	$(VENV)/bin/ruff format --check --config $(CLIENT)/pyproject.toml $(CLIENT) Tests
	cd $(CLIENT) && ../../$(VENV)/bin/mypy noether_writer
	$(PY) Tests/Lint/house_rules.py
	$(PY) Tests/Docs/limits.py
	$(PY) Tests/Guards/guards.py --check-markers

# API references as web pages: .docs/python, which a browser opens as files, and .docs/swift, which wants a server
# (python3 -m http.server -d .docs/swift, then localhost:8000/documentation/noetherwriterclient). Fails where a public
# symbol has no words, a link leads nowhere, or an example does not compile.
DOCS := .docs
ARTICLES := Sources/NoetherWriterClient/NoetherWriterClient.docc
# Where the compiler finds the library as `build` has made it, and the C modules below it.
LIBRARY = -I .build/release/Modules -I Sources/CDeflate \
    $(foreach name,CLinux CCopy,-Xcc -fmodule-map-file=.build/release/$(name).build/module.modulemap)

docs: build $(VENV)/ready
	rm -rf $(DOCS) && mkdir -p $(DOCS)/symbols
	swift symbolgraph-extract -module-name NoetherWriterClient $(LIBRARY) -output-dir $(DOCS)/symbols \
	    -minimum-access-level public -skip-synthesized-members \
	    -target $$(swift -print-target-info | sed -n 's/.*"unversionedTriple": "\(.*\)".*/\1/p')
	$(PY) Tests/Docs/undocumented.py $(DOCS)/symbols/*.symbols.json
	$(PY) Tests/Docs/examples.py $(ARTICLES)/*.md > $(DOCS)/examples.swift
	swiftc -typecheck -parse-as-library -swift-version 6 -suppress-warnings $(LIBRARY) $(DOCS)/examples.swift
	docc convert $(ARTICLES) --additional-symbol-graph-dir $(DOCS)/symbols --warnings-as-errors \
	    --output-path $(DOCS)/swift --fallback-display-name NoetherWriterClient \
	    --fallback-bundle-identifier noether-writer.NoetherWriterClient
	$(PY) -m pdoc -d google -o $(DOCS)/python noether_writer noether_writer.errors noether_writer.subscription

# Ratios against peers and limits in one run; ROUNDS=, CASES= (digits of the checkpoints' cases), BENCH_DIRECTORY= (the
# disk to measure). Results stay in .bench; the charts of the README are drawn from them.
bench: build system-systemd $(VENV)/bench-ready
	mkdir -p .bench
	$(PY) Tests/Benchmarks/checkpoints.py .bench/checkpoints.json
	$(PY) Tests/Benchmarks/scalars.py .bench/scalars.json
	$(PY) Tests/Benchmarks/sharded.py .bench/sharded.json
	$(PY) Tests/Benchmarks/restore.py .bench/restore.json
	$(PY) Tests/Benchmarks/charts.py Tests/Benchmarks/results .bench/checkpoints.json .bench/scalars.json

# The same on a CUDA device, in 5 minutes; GPU_OPTIONS="--full" for more, "--require-device" to fail without one. It
# builds nothing: the client is what `make build` has made here, else what GPU_PYTHON has installed (a wheel).
GPU_PYTHON ?= $(PYTHON)
bench-gpu: export PYTHONPATH := $(if $(wildcard $(CORE)),$(CURDIR)/$(CLIENT))
bench-gpu: export NOETHER_WRITER_DAEMON := $(if $(wildcard $(DAEMON)),$(CURDIR)/$(DAEMON))
bench-gpu:
	mkdir -p .bench && rm -f .bench/gpu.json
	$(GPU_PYTHON) Tests/Benchmarks/gpu.py .bench/gpu.json $(GPU_OPTIONS)
	if [ -e .bench/gpu.json ]; then $(GPU_PYTHON) Tests/Benchmarks/charts.py .bench .bench/gpu.json; fi

$(VENV)/bench-ready: $(VENV)/ready
	$(PY) -m pip install -q --disable-pip-version-check tensorboard wandb trackio safetensors
	touch $@

# The real Noether package, each version in an environment of its own: it needs Python 3.12 and pins a CUDA torch, some
# 7 GB each. Not a part of `make test`.
PYTHON312 ?= python3.12
NOETHER_VERSIONS := 2.0.0 2026.4.0

test-noether: build $(NOETHER_VERSIONS:%=.venv-noether-%/ready)
	@for version in $(NOETHER_VERSIONS); do \
	    echo "emmiai-noether $$version"; \
	    .venv-noether-$$version/bin/python -m pytest -q -rfEs Tests/Noether || exit 1; \
	done

.venv-noether-%/ready: Makefile
	$(PYTHON312) -m venv .venv-noether-$*
	.venv-noether-$*/bin/pip install -q --disable-pip-version-check emmiai-noether==$* pytest
	touch $@

# The adapters with the real frameworks. Not a part of `make test`: they are a gigabyte, and DeepSpeed compiles.
FRAMEWORKS := .venv-frameworks

test-frameworks: build $(FRAMEWORKS)/ready
	cd Tests/Frameworks && PATH="$(CURDIR)/$(FRAMEWORKS)/bin:$$PATH" \
	    $(CURDIR)/$(FRAMEWORKS)/bin/python -m pytest -q -rfEs -W ignore

$(FRAMEWORKS)/ready: Makefile
	$(PYTHON) -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/pip install -q --disable-pip-version-check 'torch==2.13.*' numpy pytest ninja 'lightning==2.6.*' \
	    'transformers==5.24.*' 'accelerate==1.15.*' 'pytorch-ignite==0.5.*' 'torchtitan==0.3.*'
	DS_BUILD_OPS=0 $(FRAMEWORKS)/bin/pip install -q --disable-pip-version-check 'deepspeed==0.19.*'
	touch $@

# The bridges with the real trackers, each with its own store or server. Not a part of `make test`: they are 1.5 GB.
TRACKERS := .venv-trackers

test-trackers: build $(TRACKERS)/ready
	cd Tests/Trackers && PATH="$(CURDIR)/$(TRACKERS)/bin:$$PATH" \
	    $(CURDIR)/$(TRACKERS)/bin/python -m pytest -q -rfEs -W ignore

$(TRACKERS)/ready: Makefile
	$(PYTHON) -m venv $(TRACKERS)
	$(TRACKERS)/bin/pip install -q --disable-pip-version-check 'torch==2.13.*' numpy pytest 'wandb==0.31.*' \
	    'mlflow==3.17.*' 'trackio==0.43.*'
	touch $@

# The lowest torch that is supported, with numpy 1, and the highest one that there is, with numpy 2. Not a part of
# `make test`: they may bring CUDA, 5 GB each.
TORCHES := lowest highest

test-torch: build $(TORCHES:%=.venv-torch-%/ready)
	@for each in $(TORCHES); do \
	    .venv-torch-$$each/bin/python -c 'import numpy, torch; print("torch", torch.__version__, numpy.__version__)' \
	    && .venv-torch-$$each/bin/python -m pytest -q -rfEs -W ignore Tests/Torch || exit 1; \
	done

.venv-torch-%/ready: Makefile
	$(PYTHON) -m venv .venv-torch-$*
	.venv-torch-$*/bin/pip install -q --disable-pip-version-check pytest pyyaml \
	    $(if $(filter lowest,$*),'torch==2.4.*' 'numpy<2',torch 'numpy>=2')
	touch $@

# Where a distribution would put them: make install DESTDIR=... PREFIX=/usr
PREFIX ?= /usr/local
BINDIR := $(PREFIX)/bin
SYSCONFDIR := $(if $(filter /usr,$(PREFIX)),/etc,$(PREFIX)/etc)
MANDIR := $(PREFIX)/share/man
UNITS := $(PREFIX)/lib/systemd
DASHBOARDS := $(PREFIX)/share/noether-writer/grafana
RECIPES := $(PREFIX)/share/noether-writer
ALERTS := $(PREFIX)/share/noether-writer/prometheus
DOCUMENTS := $(PREFIX)/share/doc/noether-writer
BASH_COMPLETIONS := $(PREFIX)/share/bash-completion/completions
ZSH_COMPLETIONS := $(PREFIX)/share/zsh/site-functions
FISH_COMPLETIONS := $(PREFIX)/share/fish/vendor_completions.d
FILLED = sed -e 's|@BINDIR@|$(BINDIR)|' -e 's|@SYSCONFDIR@|$(SYSCONFDIR)|'

# Which programs are installed, and whether without what a debugger needs: STRIP=-s.
PROGRAMS ?= .build/release
STRIP ?=

# Without building: `make build` first, as the user who develops; then install, as root.
install:
	install $(STRIP) -D -m 755 -t $(DESTDIR)$(BINDIR) $(PROGRAMS)/noether-writerd $(PROGRAMS)/noether-writer
	install -D -m 644 -t $(DESTDIR)$(MANDIR)/man8 config/man/noether-writerd.8
	install -D -m 644 -t $(DESTDIR)$(MANDIR)/man1 config/man/noether-writer.1
	install -D -m 644 -t $(DESTDIR)$(MANDIR)/man5 config/man/noether-writer.yaml.5
	install -D -m 644 -t $(DESTDIR)$(DASHBOARDS) config/grafana/noether-writer.json
	install -D -m 644 -t $(DESTDIR)$(ALERTS) config/prometheus/noether-writer.rules.yml
	install -D -m 755 -t $(DESTDIR)$(RECIPES)/slurm config/slurm/prolog config/slurm/task-prolog config/slurm/epilog
	install -D -m 644 -t $(DESTDIR)$(RECIPES)/kubernetes config/kubernetes/sidecar.yaml config/kubernetes/daemonset.yaml
	install -D -m 644 -t $(DESTDIR)$(DOCUMENTS) LICENSE NOTICE
	install -D -m 644 $(COMPLETIONS)/bash $(DESTDIR)$(BASH_COMPLETIONS)/noether-writer
	install -D -m 644 $(COMPLETIONS)/zsh $(DESTDIR)$(ZSH_COMPLETIONS)/_noether-writer
	install -D -m 644 $(COMPLETIONS)/fish $(DESTDIR)$(FISH_COMPLETIONS)/noether-writer.fish
	# A site's own settings stay.
	[ -e $(DESTDIR)$(SYSCONFDIR)/noether-writer/noether-writer.yaml ] || \
	    install -D -m 644 -t $(DESTDIR)$(SYSCONFDIR)/noether-writer config/noether-writer.yaml
	install -d $(DESTDIR)$(UNITS)/user $(DESTDIR)$(UNITS)/system
	for unit in noether-writer.socket noether-writer.service; do \
	    $(FILLED) systemd/$$unit > $(DESTDIR)$(UNITS)/user/$$unit \
	        && chmod 644 $(DESTDIR)$(UNITS)/user/$$unit || exit 1; done
	for unit in noether-writer@.socket noether-writer@.service; do \
	    $(FILLED) systemd/$$unit > $(DESTDIR)$(UNITS)/system/$$unit \
	        && chmod 644 $(DESTDIR)$(UNITS)/system/$$unit || exit 1; done

# Settings stay, as a package manager leaves them.
uninstall:
	rm -f $(DESTDIR)$(BINDIR)/noether-writerd $(DESTDIR)$(BINDIR)/noether-writer
	rm -f $(DESTDIR)$(MANDIR)/man8/noether-writerd.8 $(DESTDIR)$(MANDIR)/man1/noether-writer.1
	rm -f $(DESTDIR)$(MANDIR)/man5/noether-writer.yaml.5 $(DESTDIR)$(DASHBOARDS)/noether-writer.json
	rm -f $(DESTDIR)$(DOCUMENTS)/LICENSE $(DESTDIR)$(DOCUMENTS)/NOTICE
	rm -f $(DESTDIR)$(ALERTS)/noether-writer.rules.yml $(DESTDIR)$(RECIPES)/kubernetes/*.yaml
	rm -f $(addprefix $(DESTDIR)$(RECIPES)/slurm/,prolog task-prolog epilog)
	rmdir $(DESTDIR)$(RECIPES)/slurm $(DESTDIR)$(RECIPES)/kubernetes $(DESTDIR)$(DASHBOARDS) $(DESTDIR)$(ALERTS) \
	    $(DESTDIR)$(dir $(DASHBOARDS)) $(DESTDIR)$(DOCUMENTS) \
	    2>/dev/null || true
	rm -f $(DESTDIR)$(BASH_COMPLETIONS)/noether-writer $(DESTDIR)$(ZSH_COMPLETIONS)/_noether-writer
	rm -f $(DESTDIR)$(FISH_COMPLETIONS)/noether-writer.fish
	rm -f $(DESTDIR)$(UNITS)/user/noether-writer.socket $(DESTDIR)$(UNITS)/user/noether-writer.service
	rm -f $(DESTDIR)$(UNITS)/system/noether-writer@.socket $(DESTDIR)$(UNITS)/system/noether-writer@.service

# Packages for Debian and for RHEL, from what `install` installs: dist/noether-writer_*.deb, dist/noether-writer-*.rpm.
PACKAGE_ROOT := .build/package
VERSION = $(shell sed -n 's/.*version = "\(.*\)".*/\1/p' Sources/Wire/Release.swift)
FILLED_PACKAGE = sed -e 's|@VERSION@|$(VERSION)|' -e 's|@ARCHITECTURE@|$(1)|'

package-root: build $(PACKER)/ready
	$(LINK_FOR_OLDER_SYSTEMS)
	rm -rf $(PACKAGE_ROOT) && install -d -m 755 $(PACKAGE_ROOT) && mkdir -p dist
	$(MAKE) -s install DESTDIR=$(CURDIR)/$(PACKAGE_ROOT) PREFIX=/usr PROGRAMS=$(LINKED) STRIP=-s

deb: package-root
	install -d -m 755 $(PACKAGE_ROOT)/DEBIAN
	$(call FILLED_PACKAGE,$(shell dpkg --print-architecture)) config/packages/control > $(PACKAGE_ROOT)/DEBIAN/control
	install -m 755 config/packages/installed $(PACKAGE_ROOT)/DEBIAN/postinst
	install -m 755 config/packages/removing $(PACKAGE_ROOT)/DEBIAN/prerm
	install -m 755 config/packages/removed $(PACKAGE_ROOT)/DEBIAN/postrm
	echo /etc/noether-writer/noether-writer.yaml > $(PACKAGE_ROOT)/DEBIAN/conffiles
	rm -f dist/noether-writer_*.deb
	dpkg-deb --root-owner-group --build $(PACKAGE_ROOT) dist

rpm: package-root system-packages
	rm -rf .build/rpm && mkdir -p .build/rpm
	$(call FILLED_PACKAGE,$(shell uname -m)) config/packages/noether-writer.spec > .build/rpm/noether-writer.spec
	for script in installed removing removed; do sed '1d' config/packages/$$script > .build/rpm/$$script; done
	rm -f dist/noether-writer-*.rpm
	rpmbuild -bb --quiet --define '_topdir $(CURDIR)/.build/rpm' --define '_rpmdir $(CURDIR)/dist' \
	    --define '_build_name_fmt %%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm' \
	    --define 'package_root $(CURDIR)/$(PACKAGE_ROOT)' --define 'scripts $(CURDIR)/.build/rpm' \
	    .build/rpm/noether-writer.spec

# For Kubernetes and other containers (config/Containerfile); IMAGE_BASE= is an image of Debian or Ubuntu.
IMAGE ?= noether-writer:$(VERSION)
BUILDER ?= $(firstword $(foreach name,buildah podman docker,$(shell command -v $(name))))

image: deb
	$(or $(BUILDER),$(error install buildah, podman or docker)) build -t $(IMAGE) -f config/Containerfile \
	    $(if $(IMAGE_BASE),--build-arg BASE=$(IMAGE_BASE)) dist

# Both packages, installed into new root directories, and run there.
test-packages: deb rpm $(VENV)/ready
	$(PY) -m pytest -q -rfEs Tests/Packages

# What packages are made with, and tried in.
system-packages: system
	@if ! { command -v rpmbuild && command -v debootstrap; } >/dev/null; then $(APT_INSTALL) rpm debootstrap; fi

clean:
	rm -rf .build $(DOCS) $(VENV) .venv-noether-* .venv-torch-* $(FRAMEWORKS) $(TRACKERS) $(CORE)
