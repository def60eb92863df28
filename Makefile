# vacli: `make help` lists the targets. Every target sets up what it needs by itself.

PYTHON ?= python3
DATA   ?=
VIDEO  ?=
STORE  ?= features.zarr
HEAD   ?= mamba
WEIGHTS ?=

VENV  := .venv
VACLI := $(VENV)/bin/vacli
READY := $(VENV)/.installed

.PHONY: help install demo features train predict test test-all bench docs lint types clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12
	@echo 'variables: DATA= (make features), VIDEO= (make predict), STORE=, HEAD=, WEIGHTS= (of the MAE), PYTHON='

install: $(READY) ## make .venv and install vacli in it

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"vacli wants Python 3.11 or newer, {sys.executable} is {v.major}.{v.minor}: make PYTHON=python3.11")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@

# ---- the three lines a user types --------------------------------------------------------------------------

features: $(READY) ## compute the features of the videos in DATA=dir/ into STORE
	@test -n "$(DATA)" || { echo 'say which videos: make features DATA=dir/' >&2; exit 2; }
	$(VACLI) extract "$(DATA)" --store "$(STORE)" $(if $(WEIGHTS),-o "mae.weights=$(WEIGHTS)")

train: $(READY) ## train HEAD on the labelled videos of STORE
	$(VACLI) train --head "$(HEAD)" --store "$(STORE)"

predict: $(READY) ## write valence and arousal of the videos in VIDEO=dir/ to predictions/
	@test -n "$(VIDEO)" || { echo 'say which videos: make predict VIDEO=dir/' >&2; exit 2; }
	$(VACLI) predict --video "$(VIDEO)" --store "$(STORE)"

# ---- the demo ----------------------------------------------------------------------------------------------

ENCODER := demo/encoder.safetensors

demo: $(READY) $(ENCODER) ## the whole job on puppet videos: features, training, evaluation, curves
	$(VACLI) demo demo/data
	@echo '== features of the puppets, into $(STORE)'
	$(VACLI) extract demo/data --store "$(STORE)" -o mae.weights=$(ENCODER)
	@echo '== heads: the linear baseline, then mamba'
	$(VACLI) train --head linear --store "$(STORE)"
	$(VACLI) train --head mamba --store "$(STORE)"
	$(VACLI) evaluate --run linear --store "$(STORE)"
	$(VACLI) evaluate --run mamba --store "$(STORE)"
	@echo '== curves of the raw validation videos'
	$(VACLI) predict --video demo/data/batch2 --run mamba --store "$(STORE)"
	@echo 'Open predictions/index.html: a page for each video, beside its CSV. This encoder knows puppets only: for people, see README.md.'

# The encoder is tuned on other puppets than the head learns from: from the same ones, the head would learn to trust
# features that know the training labels by heart.
$(ENCODER): | $(READY)
	@echo '== puppets, and a small ViT tuned on them: a stand-in for the MAE, whose weights cannot be shipped'
	$(VACLI) demo demo/tuning --train 64 --validation 8 --length-s 10 --seed 1
	$(VACLI) finetune demo/tuning --out $@ --store demo/tuning.zarr --from-scratch --model test_vit --size 96 \
	  --frames-per-video 100 --epochs 8 \
	  --note 'a small ViT tuned on puppets for the demo: what it says of real people means nothing'

# ---- for engineers -----------------------------------------------------------------------------------------

test: $(READY) ## run the tests
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest -q -m "not slow"

test-all: $(READY) ## run all tests, the slow ones too
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest -q

bench: $(READY) ## measure, each figure beside its plain twin, into benchmarks/RESULTS.md
	$(VENV)/bin/python -m benchmarks

docs: $(READY) ## build the documentation into site/, to be read without a network
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict
	@echo 'open site/index.html'

lint: $(READY) ## check the style
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(READY) ## check the types (mypy sees the package as it is built)
	@T=$$(mktemp -d) && trap 'rm -rf "$$T" build' EXIT && \
	  $(VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps -t "$$T" . && \
	  MYPYPATH="$$T" $(VENV)/bin/python -m mypy -p vacli

clean: ## remove what the demo made; features.zarr and runs/ are yours to remove
	rm -rf demo build site *.egg-info
