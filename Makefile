# `make demo` and `make test` need only python3 (3.10 or newer, with venv) and the network the first time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What trains needs PyTorch: an environment that has it beside all that the other one has.
TRAIN := .venv-train
SPEECH := examples/speech

# A virtual environment or module path of the caller must not reach into ours. Tests start some hundred processes, which
# would each compile the whole package.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE
# Every core has a worker or two, so threads of NumPy's and PyTorch's products would only wait for each other.
test test-arm test-train: export OPENBLAS_NUM_THREADS = 1
test test-arm test-train: export MKL_NUM_THREADS = 1

.PHONY: demo test test-arm test-train test-all soak lint format clean

demo: $(STAMP)
	$(BIN)/nnfuze compile $(SPEECH)/independent/keyword.onnx $(SPEECH)/independent/speaker.onnx --target host \
	  --merge $(SPEECH)/merged --calibration $(SPEECH)/calibration.npz --evaluation $(SPEECH)/evaluation.npz \
	  --quantize int8 --prune 0.75 --trials 16 --work-dir build/demo-tuning --force -o build/demo

# Some tests wait for others' processes most of the time, so there are more workers than the two cores that this asks for.
WORKERS := -n 3 --dist worksteal

# make test ARGS="tests/passes -k merge"
test: $(STAMP)
	$(BIN)/python -m pytest $(WORKERS) $(ARGS)

# On emulated ARM boards: needs the Debian packages qemu-user and mmdebstrap, and makes a folder of 220 MB in ~/.cache.
# make test-arm ARGS="-k resnet8"
test-arm: $(STAMP)
	NNFUZE_TEST_ARM=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/arm $(ARGS)

# With PyTorch, in an environment of its own: what trains, and PyTorch's programs.
# make test-train ARGS="-k merging"
test-train: $(TRAIN)/.installed
	$(TRAIN)/bin/python -m pytest tests/training tests/frontend/test_exported_program.py $(ARGS)

# Also what takes long and finds little that the others don't: for every night.
test-all:
	$(MAKE) test ARGS=--all
	$(MAKE) test-arm ARGS=--all
	$(MAKE) test-train ARGS=--all

# Ten minutes of tuning while boards and trackers die.
soak: $(STAMP)
	$(BIN)/python -m tests.jobs.tuning.soak

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(TRAIN) build *.egg-info .mypy_cache .pytest_cache .ruff_cache

# Most of what is installed is never imported, so pip compiles nothing; what all processes import is compiled once.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: sudo apt install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is older than 3.10: make PYTHON=/path/to/python3.10" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments: sudo apt install python3-venv" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV) (the first time about 330 MB to download) ..."
	@$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[test]'
	@$(BIN)/python -c "import onnx.reference, onnxruntime, tvm.s_tir.meta_schedule"
	@touch $@

$(TRAIN)/.installed: $(STAMP)
	$(BIN)/python -m venv --clear $(TRAIN)
	@$(BIN)/python -c "import glob, sysconfig; open(glob.glob('$(TRAIN)/lib/python*/site-packages')[0] + '/beside.pth', 'w').write('import site; site.addsitedir(%r)' % sysconfig.get_paths()['purelib'])"
	@echo "Installing PyTorch into $(TRAIN) ..."
	@$(TRAIN)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt torch onnxscript
	@touch $@
