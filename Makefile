# Two commands do all set-up on a fresh machine with Python 3.11+: `make demo` and `make test`.
PYTHON ?= python3
TORCH ?= torch==2.13.0
ROOT ?= ./runs/demo
BIN := .venv/bin
KILLS ?= 200
CUTS ?= 50
SOAK ?= 10000
FUZZ ?= 60
DEPTH ?= 2
# What `make test` and `make ci-extra` leave out of large families of cases; empty in `make full`. See tests/sampling.py.
SAMPLE ?= --sample
# One more than cores, because many tests wait.
WORKERS ?= 3
# A file at a time, because its servers and ranks are kept for it; the long ones first, as tests/sampling.py has them.
SHARE = -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 25

# Where Python is told to keep no bytecode, each of the hundreds of processes of the tests would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-s3 test full check cov unit integrations kill stories crash-full power soak fuzz audit model stories-long \
	mutation terraform terraform-docs oldest slow spec golden docs picture fmt clean ci-extra trainers bench bench-quick bench-report
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
	$(BIN)/python -m pip install --quiet --no-compile -e ".[test,dev]"
	@touch $@

venv: .venv/.dev ## the virtual environment with everything in it, for an editor or a shell

demo: .venv/.runtime ## train a small transformer, kill it in mid-save, resume, compare bit for bit (ROOT=./folder, s3://…, gs://…)
	$(if $(EXTRA),$(BIN)/python -m pip install --quiet -e ".$(EXTRA)")
	$(BIN)/python examples/demo.py --root "$(ROOT)"

demo-s3: .venv/.runtime ## the same on a real S3 server, which it starts on loopback and stops again
	$(BIN)/python -m pip install --quiet -e ".[s3,servers]"
	$(BIN)/python examples/demo_s3.py

test: ## everything a change must pass; of large families of cases a sample (make full runs them all)
	$(MAKE) -j2 .venv/.dev .venv-terraform/.ready
	$(MAKE) --output-sync=target -j2 check cov  # one reads, one computes
	$(MAKE) unit

full: ## every case of every suite, slow ones and all trainers included; about three hours on 2 cores (an estimate)
	$(MAKE) test SAMPLE=
	$(MAKE) slow
	$(MAKE) integrations

check: .venv/.dev ## format, lint, types, floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

cov: .venv/.dev ## the pure core, with all of its branches
	$(BIN)/python -m pytest tests/core -q -n 2 $(SAMPLE) --cov=cloudckpt.core --cov-branch --cov-report=term-missing:skip-covered --cov-fail-under=100

unit: .venv/.dev .venv-terraform/.ready ## every other suite but the slow ones
	$(BIN)/python -m pytest tests --ignore=tests/core --ignore=tests/integrations -m "not slow" $(SHARE) $(SAMPLE)

integrations: .venv/.dev ## real trainers of other libraries, killed and gone on with; installs them first
	$(BIN)/python -m pip install --quiet -e ".[test,integrations]"
	$(BIN)/python -m pytest tests/integrations -n 2 --dist loadfile

trainers: .venv/.dev ## of those Hugging Face's, Lightning's, Accelerate's and Ignite's, each killed once on SeaweedFS, what they do when a training diverges, two ranks of Accelerate, forgather's interface, and the listeners; installs them first
	$(BIN)/python -m pip install --quiet -e ".[test,trainers]"
	$(BIN)/python -m pytest tests/integrations --ignore=tests/integrations/test_ray.py \
		-k "killed or diverges or two_ranks or pinned or test_forgather or test_listeners" -m "not slow" -n 2 --dist loadfile

kill: .venv/.dev ## kill -9 at KILLS moments (200) and print which phase was hit; stop processes and wake them up when others went on
	$(BIN)/python -m pytest tests/crash/test_kill.py tests/crash/test_zombie.py tests/distributed/test_kill_loop.py \
		tests/distributed/test_torchrun_kills.py -m "slow or not slow" -s --kills $(KILLS)

stories: .venv/.dev ## every story on each of BACKENDS (moto seaweedfs gcs fake-gcs-server)
	for backend in $(BACKENDS); do $(BIN)/python -m pytest tests/stories --on $$backend -n 2 --dist loadfile || exit 1; done

crash-full: .venv/.dev ## break every STRIDE-th (1st) call and request of a history on every store; about 90 minutes on 2 cores (an estimate)
	$(BIN)/python -m pytest tests/crash/test_stop_at_every_call.py tests/crash/test_faults_on_the_wire.py \
		tests/crash/test_every_operation_on_stores.py tests/crash/test_pause_at_every_call.py \
		tests/crash/test_pull_at_every_call.py -m slow --stride $(STRIDE) -n 2

power: .venv/.dev ## cut the power CUTS times (50) under each file system that this machine can mount
	$(BIN)/python -m pytest tests/power -m "slow or not slow" -s --cuts $(CUTS)

soak: .venv/.dev ## SOAK saves (10000) in one run, with faults and a reader beside it
	$(BIN)/python -m pytest tests/soak -m "slow or not slow" --soak $(SOAK)

fuzz: .venv/.dev ## every parser with hostile input, for FUZZ seconds (60) each
	$(BIN)/python -m pytest tests/security/test_fuzz.py --fuzz-seconds $(FUZZ)

audit: .venv/.dev ## dependencies, installed and allowed, against the advisories that are kept here; offline
	$(BIN)/python tools/audit.py

model: .venv/.dev ## every interleaving of the protocol's requests within DEPTH (2), and what must not go unnoticed
	$(BIN)/python -m pytest tests/model -s -q -n 2 --model-depth $(DEPTH)

stories-long: .venv/.dev ## thousands of random histories of several processes over one run
	$(BIN)/python -m pytest tests/stateful -s --stories long

mutation: .venv/.dev ## change the code that decides, one thing at a time, and see whether a test notices; goes on where it stopped
	$(BIN)/python -m pip install --quiet -e ".[mutation]"
	$(BIN)/python tools/mutation.py run

# checkov, and what serves providers' schemas to Terraform, in an environment of their own: both pin protobuf and more.
.venv-terraform/.ready: tools/terraform_requirements.txt
	$(PYTHON) -m venv .venv-terraform
	.venv-terraform/bin/python -m pip install --quiet -r $<
	@touch $@

terraform: .venv/.dev .venv-terraform/.ready ## the modules offline: fmt, validate, plan, their own tests, checkov, and each role's rights
	$(BIN)/python -m pytest tests/terraform tests/core/test_rights.py

terraform-docs: .venv/.dev .venv-terraform/.ready ## write policies, permissions, checkov's report and the tables of the modules' READMEs anew
	$(BIN)/python tools/generate_terraform.py --write

oldest: ## the suites of the stores and of many ranks with the oldest s3fs, gcsfs and torch that are supported, in .venv-oldest
	tools/test_oldest.sh

slow: .venv/.dev .venv-terraform/.ready ## every slow suite at full length
	$(BIN)/python -m pytest tests --ignore=tests/integrations -m slow -s --kills $(KILLS)

# 195 s on 2 cores, as measured. With --kills 8 the kill suites run at their least: 8 kills of a trainer, 6 on S3, 4 zombies on S3.
ci-extra: .venv/.dev .venv-terraform/.ready ## the slow suites, shorter
	$(BIN)/python -m pytest tests --ignore=tests/integrations -m slow $(SHARE) $(SAMPLE) --kills 8 --stride 50 --soak 300

spec: .venv/.dev ## write the examples of docs/spec/v1.md and the generated tables anew
	$(BIN)/python tools/generate_docs.py --write

docs: .venv/.dev ## build the documentation site into build/site, with warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

picture: .venv/.dev ## run the demo in a terminal and write the picture of it that the README shows
	$(BIN)/python tools/record_demo.py

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
	rm -rf .venv .venv-bench .venv-terraform runs dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .import_linter_cache
