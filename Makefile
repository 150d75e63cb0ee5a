# Every target sets up what it needs in .venv (test-oldest: in .venv-oldest) and skips what is there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

.PHONY: help quickstart test test-all test-browser test-oldest lint format bench fidelity build clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version.split()[0])'
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

quickstart: $(VENV)/installed  ## Train a ViT on handwritten digits and classify with it
	$(BIN)/python -m trainers.finetune --recipe quickstart --overwrite true

test: lint  ## Lint and run the fast tests
	$(BIN)/python $(PYTEST) -m 'not slow'

test-all: lint  ## Run all tests
	$(BIN)/python $(PYTEST)

test-browser: $(VENV)/installed-dev  ## Try the demo in a real browser; Chromium is installed by apt where it is missing
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[browser]'
	command -v chromium || $(if $(filter-out 0,$(shell id -u)),sudo) apt-get install --yes chromium
	$(BIN)/python -m pytest tests/test_browser.py

test-oldest:  ## Run the tests with the oldest versions that pyproject.toml allows, in .venv-oldest
	test -x .venv-oldest/bin/pip || $(PYTHON) -m venv --clear .venv-oldest
	grep -oE '"[A-Za-z-]+>=[0-9.]+"' pyproject.toml | tr -d '"' | sed 's/>=/==/' | sort -u > .venv-oldest/bounds.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-oldest/bounds.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	.venv-oldest/bin/python $(PYTEST) -m 'not slow'

lint: $(VENV)/installed-dev  ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed-dev  ## Fix style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed-dev  ## Time models against transformers and timm, in hours: runs/speed.md
	mkdir -p runs
	$(BIN)/python tests/benchmarks/speed.py --output runs/speed.md

fidelity: $(VENV)/installed-dev  ## Compare outputs with transformers and timm
	$(BIN)/python tests/benchmarks/fidelity.py

build: $(VENV)/installed-dev  ## Build the wheel into dist/
	rm -rf build
	$(BIN)/python -m build --wheel

clean:  ## Remove what the other targets made, runs/ excepted
	rm -rf $(VENV) .venv-oldest build dist *.egg-info .pytest_cache .ruff_cache
