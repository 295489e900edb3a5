# make demo   run the embedded study        make check      lint and types
# make test   run the tests                 make test-slow  run the slow tests as well
# make bench  run the benchmarks            make clean      remove what was built
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A test that hangs ends the run, after its time-out in pyproject.toml; pytest has this since 9.
PYTEST := $(BIN)/python -m pytest -q -o faulthandler_exit_on_timeout=true
STAMP := $(VENV)/.installed
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)

.PHONY: demo test test-slow check bench real-run clean
.DEFAULT_GOAL := test

demo: $(STAMP)
	$(BIN)/raco-fast demo

test: $(STAMP)
	$(PYTEST) -m "not slow"

test-slow: $(STAMP)
	$(PYTEST)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(PYTEST) bench --benchmark-enable --benchmark-group-by=group
	$(BIN)/python -m bench.report --out runs/bench --device cpu

real-run: $(STAMP)
	$(BIN)/python bench/real_run/run.py

$(STAMP): $(SOURCES)
	@echo "raco_fast: installing into $(VENV) (a minute or two the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@

clean:
	rm -rf build dist *.egg-info raco_fast/*.so .pytest_cache .mypy_cache .ruff_cache
