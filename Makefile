# make demo   run the embedded study        make check          lint and types
# make test   run the tests                 make test-slow      run the slow tests as well
# make bench  run the benchmarks            make test-numerics  as on another CPU, with two threads
# make clean  remove what was built
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A test that hangs fails and ends its process, after its time-out in pyproject.toml and with a stack
# of every thread; pytest has this since 9. Another process takes what is left.
PYTEST := $(BIN)/python -m pytest -q -o faulthandler_exit_on_timeout=true
STAMP := $(VENV)/.installed
# A process on each idle core; they take tests from each other's ends, so that files mostly stay
# together and what a file builds once is rarely built twice.
PARALLEL := -n auto --maxprocesses 8 --dist worksteal
NUMERICS := tests/backends tests/kernels/test_weight_grad_plan.py $(addprefix tests/,$(addsuffix .py,\
	$(addprefix engine/test_,contributions sequences lm_head backward) \
	$(addprefix optim/test_,gram_first rounding)))
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*/*)

.PHONY: demo test test-slow test-numerics check bench real-run clean
.DEFAULT_GOAL := test

demo: $(STAMP)
	$(BIN)/raco-fast demo

test: $(STAMP)
	$(PYTEST) $(PARALLEL) -m "not slow"

test-slow: $(STAMP)
	$(PYTEST) $(PARALLEL)

test-numerics: $(STAMP)
	ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=2 $(PYTEST) --tap-functions -m "not slow" $(NUMERICS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(PYTEST) bench --benchmark-enable --benchmark-group-by=group
	$(BIN)/python -m bench.report --out runs/bench --device cpu

real-run: $(STAMP)
	$(BIN)/python -m bench.real_run.run

$(STAMP): $(SOURCES)
	@echo "raco_fast: installing into $(VENV) (a minute or two the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@

clean:
	rm -rf build dist *.egg-info raco_fast/*.so .pytest_cache .mypy_cache .ruff_cache
