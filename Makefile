.DEFAULT_GOAL := help
SHELL := bash
PYTHON ?= python3
BIN := .venv/bin

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: .venv/ready  ## make .venv with everything the tests need

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

.venv/demo: pyproject.toml constraints.txt
	test -f .venv/ready || { $(PYTHON) -m venv .venv && $(BIN)/pip install -q -c constraints.txt -e '.[demo]'; }
	touch $@

demo: .venv/demo  ## embed and index this Python's own documentation with MiniLM, and ask it three questions
	$(BIN)/python -m benchmarks.demo

servers: .venv/ready  ## install the S3 servers of the tests: Ceph where apt and root are there, Swift
	bash tests/real/install.sh

test: .venv/ready servers check  ## lint, types, and every quick test
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: .venv/ready  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready  ## let ruff write the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/ready  ## write the option tables of docs/ from the code
	$(BIN)/python docs/options.py

chaos: .venv/ready servers  ## embed and rerank, 100,000 rows, local and Ceph, 30 kills each of driver, workers and server; evaluate, 20; train, 12, and a lost node; index, 40; three hosts and their faults; a head that dies for 20 minutes; drivers of one output
	$(BIN)/python -m tests.chaos.chaos --job embed
	$(BIN)/python -m tests.chaos.chaos --job rerank
	$(BIN)/python -m tests.chaos.evaluation
	$(BIN)/python -m tests.chaos.finetune
	$(BIN)/python -m tests.chaos.finetune --parallel fsdp --kills 2 --driver-kills 0
	$(BIN)/python -m tests.chaos.finetune --lose-node
	$(BIN)/python -m tests.chaos.index
	$(BIN)/python -m tests.chaos.hosts
	$(BIN)/python -m tests.chaos.hosts --finetune
	$(BIN)/python -m tests.chaos.heads
	$(BIN)/python -m pytest -o addopts="-q" tests/chaos/slices.py

scale: .venv/ready  ## 200,000 shards, memory of workers, joins, search and a loss of 65,536 rows; a bare submission; MiniLM on wn-8k; autoscaling
	$(BIN)/python -m pytest -o addopts="-q -s" tests/scale

test-extras: .venv/ready servers  ## the adapter for mteb, with mteb itself (adds it to .venv)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,mteb]'
	$(BIN)/python -m pytest -o addopts="-q" tests/extras

bench: .venv/ready  ## each job side by side with its peers, on this machine
	$(BIN)/python -m benchmarks.embed_cpu
	$(BIN)/python -m benchmarks.rerank_cpu
	$(BIN)/python -m benchmarks.search_cpu
	$(BIN)/python -m benchmarks.finetune_cpu
	$(BIN)/python -m benchmarks.finetune_quality
	$(BIN)/python -m benchmarks.index_vectors
	$(BIN)/python -m benchmarks.index_cpu

size:  ## lines a file
	@git ls-files '*.py' | xargs wc -l | sort -n

.PHONY: help setup demo servers test check format docs chaos scale test-extras bench size
