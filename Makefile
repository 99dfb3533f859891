# Two commands do all set-up on a fresh machine with Python 3.11+: `make demo` and `make test`.
PYTHON ?= python3
TORCH ?= torch==2.13.0
ROOT ?= ./runs/demo
BIN := .venv/bin
KILLS ?= 200
# What `make test` and `make ci-extra` leave out of large families of cases; empty in `make full`. See tests/sampling.py.
SAMPLE ?= --sample
WORKERS ?= 2
# A file at a time, because its servers and ranks are kept for it; the long ones first, as tests/sampling.py has them.
SHARE = -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-s3 test full check cov unit kill stories crash-full oldest slow spec golden fmt clean ci-extra bench bench-quick bench-report
# What the demo needs beside the core, by the root it is given.
EXTRA = $(if $(filter s3://% s3a://%,$(ROOT)),[s3],$(if $(filter gs://% gcs://%,$(ROOT)),[gcs]))
BACKENDS ?= moto seaweedfs gcs fake-gcs-server
STRIDE ?= 1

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.runtime: pyproject.toml tools/install_torch.sh | .venv/bin/python
	tools/install_torch.sh .venv "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

.venv/.dev: .venv/.runtime
	$(BIN)/python -m pip install --quiet -e ".[test,dev]"
	@touch $@

venv: .venv/.dev ## the virtual environment with everything in it, for an editor or a shell

demo: .venv/.runtime ## train a small transformer, kill it in mid-save, resume, compare bit for bit (ROOT=./folder, s3://…, gs://…)
	$(if $(EXTRA),$(BIN)/python -m pip install --quiet -e ".$(EXTRA)")
	$(BIN)/python examples/demo.py --root "$(ROOT)"

demo-s3: .venv/.runtime ## the same on a real S3 server, which it starts on loopback and stops again
	$(BIN)/python -m pip install --quiet -e ".[s3,servers]"
	$(BIN)/python examples/demo_s3.py

test: check cov unit ## everything a change must pass; of large families of cases a sample (make full runs them all)

full: ## every suite with every case, the slow ones at full length
	$(MAKE) test SAMPLE=
	$(MAKE) slow

check: .venv/.dev ## format, lint, types, floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

cov: .venv/.dev ## the pure core, with all of its branches
	$(BIN)/python -m pytest tests/core -q -n 2 $(SAMPLE) --cov=cloudckpt.core --cov-branch --cov-report=term-missing:skip-covered --cov-fail-under=100

unit: .venv/.dev ## every other suite but the slow ones
	$(BIN)/python -m pytest tests --ignore=tests/core -m "not slow" $(SHARE) $(SAMPLE) --durations 25

kill: .venv/.dev ## kill -9 at KILLS moments (200) and print which phase was hit
	$(BIN)/python -m pytest tests/crash/test_kill.py -m slow -s --kills $(KILLS)

stories: .venv/.dev ## every story on each of BACKENDS (moto seaweedfs gcs fake-gcs-server)
	for backend in $(BACKENDS); do $(BIN)/python -m pytest tests/stories --on $$backend -n 2 --dist loadfile || exit 1; done

crash-full: .venv/.dev ## break every STRIDE-th (1st) call and request of a history on every store; 40 minutes on 2 cores
	$(BIN)/python -m pytest tests/crash/test_stop_at_every_call.py tests/crash/test_faults_on_the_wire.py -m slow --stride $(STRIDE) -n 2

oldest: ## the suites of the stores and of many ranks with the oldest s3fs, gcsfs and torch that are supported, in .venv-oldest
	tools/test_oldest.sh

slow: .venv/.dev ## every slow suite at full length
	$(BIN)/python -m pytest tests -m slow -s --kills $(KILLS)

ci-extra: .venv/.dev ## the slow suites, shorter
	$(BIN)/python -m pytest tests -m slow $(SHARE) $(SAMPLE) --kills 24 --stride 50

spec: .venv/.dev ## write the examples of docs/spec/v1.md and the generated tables anew
	$(BIN)/python tools/generate_docs.py --write

golden: .venv/.dev ## write a golden store of the current format (only for a new format)
	$(BIN)/python tools/make_golden.py

.venv-bench/.ready: benchmarks/requirements.txt benchmarks/install.py pyproject.toml tools/install_torch.sh
	$(PYTHON) -m venv .venv-bench
	tools/install_torch.sh .venv-bench "$(TORCH)"
	.venv-bench/bin/python -m pip install --quiet -e ".[s3]"
	.venv-bench/bin/python benchmarks/install.py
	@touch $@

bench: .venv-bench/.ready ## measure everything beside the peers and write docs/performance.md; goes on where it was broken off (BENCH=--fresh)
	.venv-bench/bin/python -m benchmarks all $(BENCH)

bench-quick: .venv-bench/.ready ## the bars at 0.5 GiB, in fewer pairs; prints their table and changes no file of the repository
	.venv-bench/bin/python -m benchmarks quick --fresh

bench-report: .venv-bench/.ready ## write docs/performance.md and its charts from the results there are
	.venv-bench/bin/python -m benchmarks report

fmt: .venv/.dev ## format and fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what the other targets made
	rm -rf .venv .venv-bench runs dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .import_linter_cache
