# Everything is reachable from here; each target sets up what it needs first.
PYTHON ?= python3
STORE ?= sqlite
BIN := .venv/bin
STAMP := .venv/.installed
PYTEST := $(BIN)/python -m pytest -q -o faulthandler_timeout=1800

.DEFAULT_GOAL := help
.PHONY: help setup demo rotation run test check format smoke bench torture lock clean

help: ## what can be done here
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

setup: $(STAMP) ## make .venv and install everything, with plain venv and pip

$(STAMP): pyproject.toml tools/lock/dev.txt tools/setup.sh
	@PYTHON="$(PYTHON)" sh tools/setup.sh
	@touch $(STAMP)

demo: setup ## two workers, thousands of real jobs, a hub that is killed in the middle; STORE=file for the file store, DEMO="--move --stay" or other options
	@$(BIN)/python tools/demo.py --store $(STORE) $(DEMO)

rotation: setup ## a live fleet's token is turned, and who was refused is counted; STORE=file for the file store
	@$(BIN)/python tools/rotation.py --store $(STORE)

run: setup ## serve on SQLite in the foreground
	@PATH="$(CURDIR)/$(BIN):$$PATH" sheratan-hub serve

test: setup ## every test, each suite within its budget of seconds
	@$(BIN)/python tools/suites.py

check: setup ## format, lint, types, floors, no registry's address
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python tools/floors.py

format: setup ## let ruff format and mend what it can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

smoke: setup ## the operators' checklist on a hub of its own for each store, or on HUB_CONTROL_URL and HUB_DATA_URL
	@if [ -n "$$HUB_CONTROL_URL$$HUB_DATA_URL$$SHERATAN_STORE_URL" ]; then exec $(BIN)/sheratan-hub smoke; fi; \
	for store in sqlite file; do SHERATAN_STORE_URL=$$store:// $(BIN)/sheratan-hub smoke || exit 1; done

bench: setup ## every store's speed against an empty handler, 10 minutes; BENCH="--quick" or other options
	@$(BIN)/python -m tools.bench $(BENCH)

torture: setup ## what takes too long for make test: 100 kills of a hub on each store, every damage and power cut, long walks beside the model; 15 minutes
	@for store in sqlite file; do $(BIN)/python tools/crash.py --store $$store --kills 100 || exit 1; done
	@MODEL_TORTURE=5 $(PYTEST) -p xdist -n 2 tests/model
	@STORE_TORTURE=4 $(PYTEST) tests/stores/test_file_power.py tests/stores/test_file_damage.py
	@GRAPH_TORTURE=10000 $(PYTEST) tests/hub/test_cascades.py
	@EXAMPLES=400 SEED=$$$$ $(PYTEST) -p xdist -n 2 tests/web/test_schemathesis.py
	@ROTATIONS=20 $(PYTEST) tests/e2e/test_rotation.py
	@$(PYTEST) tests/world/container_build.py

lock: setup ## resolve the dependencies anew into tools/lock
	@sh tools/lock.sh

clean: ## remove what was installed and cached
	@rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
