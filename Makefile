# `make` alone lists the targets. PYTHON=... chooses the interpreter, PYTEST_FLAGS=... what pytest runs.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help venv venv-demo demo app test bench style quality clean

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# gradio refuses the Pillow that everything else is developed with
DEMO_VENV := .venv-demo
DEMO_STAMP := $(DEMO_VENV)/.installed
PYTHON ?= $(shell for p in python3.11 python3 python; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PYTEST_FLAGS ?=

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP)  ## create .venv with the tested versions; does nothing when it is up to date

venv-demo: $(DEMO_STAMP)  ## create .venv-demo, the environment of demo_app.py

$(DEMO_STAMP): requirements-demo.txt constraints-demo.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later not found; install it, or say make PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/python -m pip install --disable-pip-version-check -r requirements-demo.txt -c constraints-demo.txt
	@touch $@

app: $(DEMO_STAMP)  ## the page to try a model on: make app MODEL=outputs/depth
	@test -n "$(MODEL)" || { echo "say which model: make app MODEL=outputs/depth (several: MODEL=\"a b\")" >&2; exit 2; }
	$(DEMO_VENV)/bin/python demo_app.py --model_path $(MODEL)

$(STAMP): requirements.txt requirements-dev.txt constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later not found; install it, or say make PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check -r requirements.txt -r requirements-dev.txt -c constraints.txt
	@touch $@

demo: $(STAMP)  ## synthetic data, two small trainings, a picture and a table under outputs/demo
	$(PY) recipes/demo.py

# Memory given back to the system after every pass of a network is asked for again in the next: a tenth of the time.
test: export MALLOC_TRIM_THRESHOLD_ := 4294967296
test: export MALLOC_MMAP_THRESHOLD_ := 4294967296
test: $(STAMP)  ## lint, formatting and all tests (those of the page need make venv-demo and Chromium)
	@failed=; \
	$(PY) -m ruff check . || failed="$$failed lint"; \
	$(PY) -m ruff format --check . || failed="$$failed formatting"; \
	$(PY) -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS) || failed="$$failed tests"; \
	if [ -n "$$failed" ]; then echo "make test FAILED after $$SECONDS s:$$failed (see above)" >&2; exit 1; fi; \
	echo "make test passed in $$SECONDS s: lint, formatting, tests"

bench: $(STAMP)  ## print the tables of docs/benchmarks.md for this machine (about an hour on two cores)
	$(PY) benchmarks/bench_startup.py
	$(PY) benchmarks/bench_step.py
	$(PY) benchmarks/bench_inference.py
	$(PY) benchmarks/count_syncs.py
	$(PY) benchmarks/bench_memory.py
	-$(PY) benchmarks/bench_growth.py
	-OMP_NUM_THREADS=1 $(PY) benchmarks/bench_scaling.py
	OMP_NUM_THREADS=1 $(PY) benchmarks/bench_data.py
	OMP_NUM_THREADS=1 $(PY) benchmarks/bench_export.py
	$(PY) benchmarks/bench_approximations.py

style: $(STAMP)  ## format the code and repair what ruff can
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

quality: $(STAMP)  ## lint and formatting, without the tests
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:  ## remove both environments, caches and outputs/demo; other outputs stay
	rm -rf $(VENV) $(DEMO_VENV) .pytest_cache .ruff_cache outputs/demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
