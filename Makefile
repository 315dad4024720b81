# Two commands on a fresh Linux machine: make demo, make test. Each sets up .venv by itself, once.
#   make demo    trains a small network on real photographs with and without two teachers, and prints a table
#   make test    everything that CI runs: lint, types, tests
#   make methods KD, DML, MAXL and SSKT beside each other on two small data sets, on a CPU (docs/methods.md)
#   make pretext puzzles, clusters and pseudo-labels on the same two data sets, on a CPU (docs/pretext.md)
#   make faults  kills the demo 200 times, on one process and on two, and compares it with an undisturbed run (docs/runs.md)
#   make venv    only the environment for the tests        make lint    ruff and mypy
#   make docs    docs made from the code and from results  make gpu     tests and benchmarks that need a CUDA device (docs/gpu.md)

.DELETE_ON_ERROR:
.PHONY: demo methods pretext faults test venv lint docs gpu clean

VENV := .venv
PY ?= $(abspath $(VENV)/bin/python)
SETUP := pyproject.toml setup.py scripts/venv.sh
DEMO_ARGS ?=
FAULTS_ARGS ?=
TEST_ARGS ?=
# the folder of Fashion-MNIST's idx files (Debian: apt-get install dataset-fashion-mnist)
FASHION ?= /usr/share/datasets/fashion-mnist
# of make gpu (scripts/gpu.py, docs/gpu.md): which steps, packed images and videos, where results go, more options
PLAN ?= check
DATA ?=
VIDEO ?=
OUT ?= build/gpu
GPU_ARGS ?=

demo: $(VENV)/.demo-ready
	$(VENV)/bin/fasttrain train demo $(DEMO_ARGS)

methods: $(VENV)/.demo-ready
	$(VENV)/bin/fasttrain train methods
	$(VENV)/bin/fasttrain train methods-fashion --data.root $(FASHION)

pretext: $(VENV)/.demo-ready
	$(VENV)/bin/fasttrain pretext pretext --probe
	$(VENV)/bin/fasttrain pretext pretext-fashion --probe --data.root $(FASHION)

faults: $(VENV)/.test-ready
	$(VENV)/bin/python -m tests.faults.kills $(FAULTS_ARGS)

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

# PY=python3 make gpu: with a Python that has PyTorch for the GPU, and what the tests import, already; nothing is installed
gpu:
	@sh scripts/tree.sh
	@rm -rf build/run && mkdir -p build/run $(OUT) && cp -r tests scripts docs benchmarks *.md pyproject.toml Makefile setup.py build/run
	$(PY) scripts/gpu.py $(PLAN) --out $(OUT) $(if $(DATA),--data $(DATA)) $(if $(VIDEO),--video $(VIDEO)) $(GPU_ARGS)

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
