# The first Python at or above 3.11, tried by running it: a version manager's shim exists for versions that do not.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo check test test-slow test-all browser test-edge bench docs

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "efficientllm needs Python 3.11 or later; name one: make install PYTHON=…" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/python -m efficientllm.demo

check: install
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

# A worker a core, for the tests use one thread each; WORKERS=0 runs them in this process, for a debugger.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n : 8)))
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist worksteal

test: install
	$(PYTEST) -m 'not slow'

test-slow: install browser
	$(PYTEST) -m slow

test-all: install browser
	$(PYTEST)

# A run's page is looked at in a real browser; where none is and none can be installed, that test skips.
browser:
	@command -v chromium chromium-browser google-chrome >/dev/null \
		|| { timeout 300 apt-get update -qq && timeout 600 apt-get install -qq -y --no-install-recommends chromium; } >/dev/null 2>&1 \
		|| echo "no Chromium, and none could be installed: the test of a page in a browser skips"

# llama.cpp is built from source here: minutes on many cores, up to half an hour on two.
EDGE := .venv/.installed-edge

$(EDGE): $(STAMP)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,llamacpp]'
	@touch $@

test-edge: $(EDGE)
	$(BIN)/pytest tests/delivery/gguf/test_gguf.py tests/delivery/gguf/test_gguf_size.py tests/delivery/gguf/test_widening.py tests/delivery/gguf/test_llama_cpp.py tests/delivery/test_onnx.py tests/delivery/test_export_folder.py tests/delivery/test_bench.py

bench:
	@sed -n 's|^    python benchmarks|$(BIN)/python benchmarks|p' benchmarks/*.py
	@echo "benchmarks/README.md holds results."

# The site: docs/_build/index.html. A warning, such as a link that leads nowhere, is an error.
SITE := .venv/.installed-docs

$(SITE): $(STAMP)
	$(BIN)/python -m pip install -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(SITE)
	$(BIN)/sphinx-build --fail-on-warning --keep-going -q -E -c docs . docs/_build
	@echo "docs/_build/index.html"
