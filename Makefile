# Promises: `make demo` runs the main job on a fresh machine, `make test` a test of every part, `make test-all` every test.
# `make check` holds style, types and the import contract. All of them share .venv and reuse it.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# constraints.txt, with the torch that was asked for in the place of the usual one.
PINS := .venv/constraints.txt
# A plain request for torch may fetch gigabytes of CUDA packages. Set TORCH to what your machine needs, for example
# `make demo TORCH=torch` on a machine with a GPU.
TORCH ?= torch==2.13.0
# Processes that share the tests.
WORKERS ?= 2

.PHONY: demo test test-all fuzz memory-check ledger check docs clean FORCE

demo: .venv/lab.done
	$(BIN)/normkit lab run convergence --data digits --out runs/demo

# What tests/quick.py leaves: some minutes.
test: .venv/test.done
	$(BIN)/python -m pytest --quick -n $(WORKERS) $(PYTEST)

# Every test: half an hour where no kernels are compiled yet.
test-all: .venv/test.done
	$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST)

# Every norm against float64 and exact rationals on other inputs each time, for some minutes.
fuzz: .venv/test.done
	$(BIN)/python -m pytest -n $(WORKERS) --hypothesis-profile=fuzz tests/differential $(PYTEST)

# Every CPU kernel under valgrind (apt install valgrind), for some minutes.
memory-check: .venv/test.done
	$(BIN)/python tests/kernels/memory_check.py

# Add claims and seeds to the kept ledger for so many minutes, and quote it in the pages that show it.
MINUTES ?= 360
ledger: .venv/lab.done
	$(BIN)/normkit lab run all --data fashion-mnist --until-decided --budget $(MINUTES) --out docs/ledger
	$(BIN)/python docs/quote_ledger.py

check: .venv/check.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --project tests/user_types --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# The site, in build/site: open build/site/index.html. A warning, a public object without an entry, or a fetch from
# elsewhere fails.
docs: .venv/docs.done
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "build/site/index.html"

clean:
	rm -rf .venv

# Which torch was asked for: another one than last time is installed in its place.
.venv/torch.asked: FORCE
	@mkdir -p .venv
	@echo "$(TORCH)" | cmp -s - $@ || echo "$(TORCH)" > $@

# torch first and alone: everything after it then finds its requirement met. It brings the triton that fits it, where it
# brings one, and both stay as they are.
.venv/torch.done: constraints.txt .venv/torch.asked
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing torch and the rest into .venv; the first time this takes a few minutes."
	grep -vE "^(torch|triton)==" constraints.txt > $(PINS)
	$(PIP) --upgrade "pip>=25.1" -c $(PINS)
	$(PIP) "$(TORCH)"
	$(BIN)/python -m pip freeze | grep -E "^(torch|triton)==" >> $(PINS)
	grep -q "^triton==" $(PINS) || grep "^triton==" constraints.txt >> $(PINS)
	touch $@

.venv/lab.done: .venv/torch.done pyproject.toml
	$(PIP) -c $(PINS) --editable ".[lab]"
# The quicker way to the kernels, where a compiler is found; all works without it.
	$(BIN)/normkit native build || true
	touch $@

.venv/test.done: .venv/lab.done
	$(PIP) -c $(PINS) --group test
# Alone, for it asks for 100 MB more that store checkpoints, which no test does; what it imports is in the group.
	$(PIP) -c $(PINS) --no-deps flax
	touch $@

.venv/check.done: .venv/lab.done
	$(PIP) -c $(PINS) --group check
	touch $@

.venv/docs.done: .venv/torch.done pyproject.toml
	$(PIP) -c $(PINS) --editable ".[docs]"
	touch $@
