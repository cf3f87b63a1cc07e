# make quickstart   sets up .venv and trains the quickstart on the built-in model
# make test         sets up .venv and runs the tests
# make slow         the tests of full-size models and of twenty kills
# make fuzz         an hour of hostile input for every reader (SECONDS=600 for ten minutes)
# make lint         ruff, types, layers
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

SECONDS ?= 3600

.PHONY: quickstart test slow fuzz lint setup clean

quickstart: $(STAMP)
	$(BIN)/runner apply recipes/quickstart/run.toml

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

fuzz: $(STAMP)
	@end=$$(( $$(date +%s) + $(SECONDS) )); while [ $$(date +%s) -lt $$end ]; do \
		RUNNER_FUZZ_EXAMPLES=1000 $(BIN)/python -m pytest -m fuzz -n 2 --hypothesis-seed=$$(date +%s) || exit 1; \
	done

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tools.make_lock --check

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/python -m compileall -q runner schemas
	@touch $(STAMP)

clean:
	rm -rf .venv
