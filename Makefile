# make run    install, then the main job: pretrain a small hybrid LM on the standard library's source and let it write
# make test   install what tests need and run every check
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test lint clean

# Installed once for each content of pyproject.toml and constraints.txt.
.venv/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/.installed-test: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

# glibc: keep freed activations instead of giving them back to the system and faulting them in again at every step.
run: export MALLOC_TRIM_THRESHOLD_ = 1000000000
run: export MALLOC_MMAP_THRESHOLD_ = 1000000000
run: export MALLOC_TOP_PAD_ = 268435456
run: .venv/.installed
	@$(BIN)/python -m train.demo

# One thread a process: the tests' tensors are small, and two processes use two cores better than two threads do. A process
# that has run out of tests takes some of the other's: a few of them run for minutes.
test: export OMP_NUM_THREADS = 1
test: .venv/.installed-test lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

clean:
	rm -rf .venv runs build *.egg-info
