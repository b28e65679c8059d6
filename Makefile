# Two promises: `make demo` runs the main job on a fresh machine, `make test` runs every test.
# `make check` holds style, types and the import contract. All three share .venv and reuse it.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# A plain request for torch may fetch gigabytes of CUDA packages. Set TORCH to what your machine needs, for example
# `make demo TORCH=torch` on a machine with a GPU.
TORCH ?= torch==2.13.0
# Processes that share the tests.
WORKERS ?= 2

.PHONY: demo test fuzz check clean

demo: .venv/lab.done
	$(BIN)/normkit lab run convergence --data digits --out runs/demo

test: .venv/test.done
	$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST)

# Every norm against float64 and exact rationals on other inputs each time, for some minutes.
fuzz: .venv/test.done
	$(BIN)/python -m pytest -n $(WORKERS) --hypothesis-profile=fuzz tests/differential $(PYTEST)

check: .venv/check.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv

# torch first and alone: everything after it then finds its requirement met.
.venv/torch.done: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing torch and the rest into .venv; the first time this takes a few minutes."
	$(PIP) --upgrade "pip>=25.1" -c constraints.txt
	$(PIP) "$(TORCH)"
	touch $@

.venv/lab.done: .venv/torch.done pyproject.toml
	$(PIP) -c constraints.txt --editable ".[lab]"
	touch $@

.venv/test.done: .venv/lab.done
	$(PIP) -c constraints.txt --group test
# Alone, for it asks for 100 MB more that store checkpoints, which no test does; what it imports is in the group.
	$(PIP) -c constraints.txt --no-deps flax
	touch $@

.venv/check.done: .venv/lab.done
	$(PIP) -c constraints.txt --group check
	touch $@
