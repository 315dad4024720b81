# Two commands on a fresh Linux machine: make demo, make test. Each sets up .venv by itself, once.
#   make demo    trains a small network on real photographs with and without two teachers, and prints a table
#   make test    everything that CI runs: lint, types, tests
#   make venv    only the environment for the tests        make lint    ruff and mypy
#   make docs    docs made from the code and from results  make gpu     tests and benchmarks that need a CUDA device

.DELETE_ON_ERROR:
.PHONY: demo test venv lint docs gpu clean

VENV := .venv
PY ?= $(VENV)/bin/python
SETUP := pyproject.toml setup.py scripts/venv.sh
DEMO_ARGS ?=
TEST_ARGS ?=
# what benchmarks and GPU tests leave
OUT ?= build/gpu

demo: $(VENV)/.demo-ready
	$(VENV)/bin/fasttrain train demo $(DEMO_ARGS)

test: lint
	$(VENV)/bin/python -m pytest -n 2 $(TEST_ARGS)

venv: $(VENV)/.test-ready

$(VENV)/.demo-ready: $(SETUP)
	@sh scripts/venv.sh demo
	@touch $@

$(VENV)/.test-ready: $(SETUP)
	@sh scripts/venv.sh test
	@touch $@ $(VENV)/.demo-ready

lint: $(VENV)/.test-ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	@sh scripts/tree.sh
	cd build/tree && ../../$(VENV)/bin/mypy --config-file ../../pyproject.toml -p fasttrain

docs: $(VENV)/.test-ready
	$(VENV)/bin/python scripts/make_docs.py

# PY=python3 make gpu: with a Python that has PyTorch for the GPU already, nothing is installed
gpu:
	@sh scripts/tree.sh
	@mkdir -p $(OUT)
	FASTTRAIN_REQUIRE_GPU=1 PYTHONPATH=build/tree $(PY) -m pytest -m gpu -p no:cacheprovider --junitxml=$(OUT)/gpu-tests.xml
	PYTHONPATH=build/tree $(PY) -m fasttrain doctor --json > $(OUT)/doctor.json

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
