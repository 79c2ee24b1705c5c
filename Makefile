# make demo         install into .venv and see the embedded model work
# make test         install into .venv and run the tests
# make eval         measure the embedded model on held-out tasks (minutes)
# make tiny-shapes  train the embedded model from scratch, as it was trained (hours)
# make check        lint, format and types, as CI does
# make test-oldest  the core of the suite on the oldest supported transformers

PYTHON ?= python3
TORCH ?= torch==2.13.0
OLDEST_TRANSFORMERS ?= transformers==5.17.0
WORKERS ?= 2
VENV := .venv
OLDEST := .venv-oldest

.PHONY: demo test eval tiny-shapes check format test-oldest clean

$(VENV)/ready: requirements.txt pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $(TORCH)
	$(VENV)/bin/python -m pip install --quiet --editable ".[dev]" --constraint constraints.txt
	touch $@

# the exact versions but that of transformers, and of what transformers decides
$(OLDEST)/ready: requirements.txt pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -v -E '^(transformers|tokenizers|huggingface_hub)==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet $(TORCH)
	$(OLDEST)/bin/python -m pip install --quiet --editable ".[dev]" $(OLDEST_TRANSFORMERS) \
		--constraint $(OLDEST)/constraints.txt
	touch $@

demo: $(VENV)/ready
	$(VENV)/bin/bagel demo

eval: $(VENV)/ready
	$(VENV)/bin/bagel eval

tiny-shapes: $(VENV)/ready
	$(VENV)/bin/python -m bagel.shapes.build start outputs/tiny-shapes/start
	OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --standalone --nproc_per_node $(WORKERS) \
		-m bagel train --config configs/tiny_shapes.yaml --resume_from_checkpoint auto
	$(VENV)/bin/python -m bagel.shapes.build finish outputs/tiny-shapes/run/ema

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest -n $(WORKERS)

test-oldest: $(OLDEST)/ready
	$(OLDEST)/bin/python -m pytest -n $(WORKERS) -m core

check: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright

format: $(VENV)/ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) $(OLDEST) .pytest_cache .ruff_cache
