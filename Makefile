# Two commands on a fresh Linux machine: make demo, make test. Each sets up .venv by itself, once.
#   make demo    trains a small network on real photographs with and without two teachers, and prints a table
#   make test    everything that CI runs: lint, types, tests
#   make methods KD, DML, MAXL and SSKT beside each other on two small data sets, on a CPU (docs/methods.md)
#   make pretext puzzles, clusters and pseudo-labels on the same two data sets, on a CPU (docs/pretext.md)
#   make faults  kills the demo 200 times, on one process and on two, and compares it with an undisturbed run (docs/runs.md)
#   make venv    only the environment for the tests        make lint    ruff and mypy
#   make docs    docs made from the code and from results  make gpu     tests and benchmarks that need a CUDA device

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
# a packed set for the loaders' benchmark on a GPU: make gpu DATA=FILE.beton
DATA ?=
# a packed set of videos for whole steps on clips: make gpu VIDEO=FILE.beton
VIDEO ?=
# what benchmarks and GPU tests leave
OUT ?= build/gpu
# not from the root: there Python would find the folder fasttrain/ instead of the package as setup.py maps it
ON_GPU = cd build/run && FASTTRAIN_REQUIRE_GPU=1 PYTHONPATH=../tree$(if $(PYTHONPATH),:$(PYTHONPATH)) $(PY) -m

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
	@rm -rf build/run && mkdir -p build/run $(OUT) && cp -r tests pyproject.toml build/run
	$(ON_GPU) fasttrain doctor --json > $(abspath $(OUT))/doctor.json
	$(ON_GPU) pytest -m gpu --junitxml=$(abspath $(OUT))/gpu-tests.xml
	$(ON_GPU) pytest tests/kernels --ignore tests/kernels/test_resources.py --junitxml=$(abspath $(OUT))/kernel-tests.xml
	$(ON_GPU) fasttrain bench kernels --batch 512,8192 --json $(abspath $(OUT))/kernels.json
	$(ON_GPU) fasttrain bench sources --batch 512 --pixels 224 --json $(abspath $(OUT))/sources.json
	$(ON_GPU) fasttrain bench transfer --target resnet18 --size 224 --batch 128 --rounds 3 --no-compile --json $(abspath $(OUT))/transfer.json
	$(if $(DATA),$(ON_GPU) fasttrain bench step --target resnet18 --size 224 --batch 512 --images 1536 --no-module --repeats 3 \
		--data $(abspath $(DATA)) --loader ffcv --json $(abspath $(OUT))/step.json)
	$(if $(VIDEO),$(ON_GPU) fasttrain bench step --target resnet3d18 --frames 16 --size 112 --batch 128 --images 1024 --repeats 3 \
		--data $(abspath $(VIDEO)) --loader video --json $(abspath $(OUT))/step-video.json)
	$(if $(VIDEO),$(ON_GPU) fasttrain bench step --target resnet3d18 --frames 16 --size 112 --batch 128 --images 1024 --repeats 3 \
		--data $(abspath $(VIDEO)) --loader video --no-module --json $(abspath $(OUT))/step-video-linear.json)
	$(if $(DATA),$(ON_GPU) fasttrain bench loaders --data $(abspath $(DATA)) --size 224 --batch 256 --json $(abspath $(OUT))/loaders.json)

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
