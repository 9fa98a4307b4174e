# drbdts: build, test, show. `make help` lists what there is.
SHELL := /bin/bash
.DEFAULT_GOAL := help
NATIVE_SOURCES := $(shell find native -name '*.rs' -not -path '*/target/*') native/Cargo.toml native/Cargo.lock native/build.rs
SOURCES := $(shell find src -name '*.ts') tsconfig.json tsconfig.build.json package.json
ESBUILD := npx --no-install esbuild --bundle --platform=node --format=esm --packages=external --log-level=warning

.PHONY: help deps tools demo-tools build lint check test demo bench sim clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 20

# Not `npm ci`: it refuses where a registry mirror leaves out other platforms' optional packages. Versions are pinned either way.
node_modules/.package-lock.json: package.json package-lock.json
	@echo "== npm packages"
	npm install --no-save --no-audit --no-fund --loglevel=error
	@touch $@

deps: node_modules/.package-lock.json

build/native.stamp: $(NATIVE_SOURCES) | node_modules/.package-lock.json
	@echo "== native addon (Rust; the first time takes a minute or two)"
	npm run --silent build:native
	@mkdir -p build && touch $@

build/dist.stamp: $(SOURCES) | node_modules/.package-lock.json
	@echo "== TypeScript"
	npm run --silent build
	@mkdir -p build && touch $@

build: build/native.stamp build/dist.stamp ## build the addon and the program (bin/drbdts)

lint: deps
	@echo "== types, format, lint"
	@npm run --silent typecheck
	@npm run --silent lint

check: lint ## types, format, lint and the tidy test
	npx --no-install vitest run test/tidy.test.ts

# Debian packages: installed when root and missing; otherwise the tests that need them are skipped, counted and named.
tools:
	@test/support/install-tools test

demo-tools:
	@test/support/install-tools demo

test: tools build lint ## install what the tests need, build, run every test
	@test/support/run-tests

demo: demo-tools build ## two heads, a client, a killed head, and that nothing was lost
	@$(ESBUILD) demo/demo.ts --outfile=build/demo.mjs
	@$(ESBUILD) demo/writer.ts --outfile=build/demo-writer.mjs
	@node build/demo.mjs

bench: tools build ## figures side by side with other servers, in one run
	@$(ESBUILD) bench/main.ts --outfile=build/bench.mjs
	@node build/bench.mjs

sim: build ## the simulator until stopped: SEED=n repeats one, COUNT=n limits
	@$(ESBUILD) test/sim/main.ts --outfile=build/sim.mjs
	@node build/sim.mjs

clean: ## remove what was built
	rm -rf dist build native/target native/*.node
