# Two commands for a fresh checkout; each sets up all it needs from python3 and make:
#   make generate   a video of the bundled model, dense and with Radial attention, compared
#   make test       style and tests (what CI runs); make slow has those that take long

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

PROMPT ?= a red balloon rises up over a green meadow at sunset
OUT    ?= outputs/first

.PHONY: generate test slow style format bench wheel clean

generate: $(READY)
	$(BIN)/vdit-sparse generate --prompt "$(PROMPT)" --preset radial-mini --compare dense \
	  --out "$(OUT)" --overwrite

test: style
# One thread a process: two processes with two threads each would wait for one another.
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest tests -m "not slow" -n 2 --dist loadfile --durations 10

# What takes long: every cell of docs/compatibility.md, compilations, a real run in the studio.
slow: $(READY)
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest tests -m slow -n 2 -p no:logging

style: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m vdit_sparse.kernels.bench

wheel: $(READY)
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) dist .pytest_cache .ruff_cache

# torch first: its CUDA builds bring the Triton they were built with, and its CPU builds bring none.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'vdit-sparse needs Python 3.11 or newer, this is ' + sys.version.split()[0] + ': set PYTHON=python3.11, say')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -c "import importlib.util as u, sys; sys.exit(u.find_spec('triton') is None and sys.platform == 'linux')" \
	  || $(BIN)/python -m pip install --quiet --disable-pip-version-check triton==3.6.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
