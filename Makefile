# The commands of this project. CI (.ci/run) calls the same `check` and `test`.
#
#   make demo    fetch libtorch, build, start the cluster in one process, ask and paint through its gRPC API
#   make test    the whole test suite (installs redis-server on Debian as root)
#   make check   format, lints, licences, contracts, chart
#   make up      the cluster in one process, serving nano, until Ctrl-C
#   make local   the same as four processes and Redis
#   make bench-router   what the router adds, carries and survives, with mock stages; minutes, on an idle machine
#   make fuzz    a million executions of each fuzz target; FUZZ_RUNS says another number
#   make eval    what nano, a small model, can do, measured through its gRPC API; goes on where it ended
#   make nano    train nano anew, from nothing, and say how long each stage took; goes on where it ended
#
# Build output and libtorch live side by side in a cache outside the clone: EMU2_CACHE, default ~/.cache/emu2.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.PHONY: demo up local eval nano bench-router fuzz test check build libtorch redis tools fmt clippy deny buf chart

export EMU2_CACHE ?= $(HOME)/.cache/emu2
export CARGO_TARGET_DIR ?= $(EMU2_CACHE)/target
BIN := $(CARGO_TARGET_DIR)/debug
TOOLS := $(EMU2_CACHE)/tools

CARGO_DENY_VERSION := 0.20.2
BUF_VERSION := 1.75.0
BUF := $(TOOLS)/buf-$(BUF_VERSION)/node_modules/.bin/buf
CARGO_DENY := $(TOOLS)/cargo-deny-$(CARGO_DENY_VERSION)/bin/cargo-deny
# Named by what is to be in it, so that another list is another environment.
CHART_TOOLS := $(TOOLS)/chart-$(shell sha256sum deploy/tools/requirements.txt | cut -c 1-12)

# nano, the trained model that ships, under its three names, unless another folder is named.
MODEL_DIR ?=

demo: libtorch
	cargo build --package emu2-cli --package emu2-local
	$(BIN)/emu2 demo --out out/demo $(if $(MODEL_DIR),--model-dir $(MODEL_DIR) --photos "$$(python3 deploy/fetch/photo.py)")

up: libtorch
	cargo build --package emu2-cli --package emu2-local
	$(BIN)/emu2 up $(if $(MODEL_DIR),--model-dir $(MODEL_DIR))

local: build redis
	deploy/local/run.sh $(BIN) $(or $(MODEL_DIR),deploy/models/nano emu2 emu2-chat emu2-gen)

eval: libtorch
	cargo build --package emu2-trainer
	$(BIN)/emu2-trainer eval --drawings "$$(python3 deploy/fetch/drawings.py --unseen)"

bench-router: redis
	deploy/fetch/package.sh nginx nginx-light
	cargo build --release --package emu2-router --package emu2-bench
	$(CARGO_TARGET_DIR)/release/bench-router $(BENCH)

fuzz:
	tests/fuzz/run.sh

# Checkpoints and curves, a folder for each stage; remove it to begin anew.
NANO_RUNS ?= $(EMU2_CACHE)/nano-runs
NANO_OUT ?= out/nano

nano: libtorch
	cargo build --package emu2-trainer
	$(BIN)/emu2-trainer train --runs $(NANO_RUNS) --drawings "$$(python3 deploy/fetch/drawings.py)"
	$(BIN)/emu2-trainer export --runs $(NANO_RUNS) --out $(NANO_OUT)

# Some tests start the real binaries, so they are built first: as all targets, because binaries alone would be built
# with other features than the tests, and everything twice.
test: libtorch redis
	cargo build --workspace --all-targets
	cargo test --workspace

build: libtorch
	cargo build --workspace --bins

check: fmt clippy deny buf chart

fmt:
	cargo fmt --all --check

clippy: libtorch
	cargo clippy --workspace --all-targets -- -D warnings

# The advisory database is not consulted: it cannot be reached from every place this runs.
deny: $(CARGO_DENY)
	$(CARGO_DENY) --config .cargo/deny.toml check bans licenses sources

buf: $(BUF)
	$(BUF) lint proto

# No cluster is needed, and none is asked: helm/emu2/README.md says what that leaves open.
chart: $(CHART_TOOLS)/installed
	$(CHART_TOOLS)/bin/hadolint deploy/Dockerfile
	$(CHART_TOOLS)/bin/python deploy/tools/check_chart.py

libtorch:
	python3 deploy/fetch/libtorch.py

redis:
	deploy/fetch/package.sh redis-server redis-server

tools: $(CARGO_DENY) $(BUF) $(CHART_TOOLS)/installed

$(CARGO_DENY):
	env -u CARGO_TARGET_DIR cargo install cargo-deny --version $(CARGO_DENY_VERSION) --locked --root $(TOOLS)/cargo-deny-$(CARGO_DENY_VERSION)

$(BUF):
	npm install --silent --no-fund --no-audit --prefix $(TOOLS)/buf-$(BUF_VERSION) @bufbuild/buf@$(BUF_VERSION)

$(CHART_TOOLS)/installed:
	python3 -m venv --clear $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --require-hashes --only-binary=:all: --requirement deploy/tools/requirements.txt
	touch $@
