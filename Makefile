# expertfleet: `make help` lists what can be done.
PY := .venv/bin/python
MODEL ?= models/demo
ARGS ?=
PROTOS := protos/experts.proto protos/shards.proto

.DEFAULT_GOAL := help
.PHONY: help setup serve test check chart-check compose-check images images-check format protos protos-check demo-model clean \
	bench bench-peers bench-targets bench-attention bench-delay bench-dispatch bench-experts bench-gateway \
	bench-autoscale bench-gpu bench-hot-expert bench-long-context bench-perplexity bench-plan \
	bench-session-restore bench-steady-cost bench-wide faults soak

help: ## show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: ## set up .venv in the checkout (TORCH=auto|cpu|cuda|none)
	@scripts/setup.sh dev

serve: ## set up what is missing and serve MODEL (default: the demo model); ARGS="--workers 4 --port 8000"
	@scripts/setup.sh run
	@exec .venv/bin/expertfleet up --model $(MODEL) --state-dir .expertfleet $(ARGS)

test: setup ## set up what is missing and run all tests (ARGS="tests/unit -x": these, so)
	@scripts/test.sh $(ARGS)

check: setup ## lint, format, types, import directions, generated code
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	$(PY) -m pytest tests/unit/test_architecture.py
	@$(MAKE) --no-print-directory protos-check
	@$(MAKE) --no-print-directory chart-check

chart-check: setup ## lint, render and validate the Helm chart with each of its values files
	$(PY) -m pytest tests/unit/deploy/test_chart_manifests.py tests/unit/deploy/test_chart_values.py

compose-check: setup ## check compose files and Dockerfile, without a container engine
	$(PY) -m pytest tests/containers

images: ## build the container images with docker or podman (DEVICE=cpu|cuda, REGISTRY=, TAG=)
	@PYTHON="$${PYTHON:-$$(test -x $(PY) && echo $(PY) || echo python3)}" scripts/images.sh

images-check: setup ## build both images, run them as compose does, kill a worker, leave nothing behind
	EXPERTFLEET_IMAGES_CHECK=build PYTHON=$(PY) $(PY) -m pytest tests/containers/test_running_images.py -s $(ARGS)

format: setup ## fix lint and format in place
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

protos: setup ## regenerate the Python of the wire contracts
	$(PY) -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

protos-check: setup ## fail when the committed wire code differs from the contracts
	@out=$$(mktemp -d) && trap 'rm -rf $$out' EXIT && \
	$(PY) -m grpc_tools.protoc -I. --python_out=$$out --pyi_out=$$out --grpc_python_out=$$out $(PROTOS) && \
	for f in $$out/protos/*; do diff -u protos/$$(basename $$f) $$f || \
	  { echo "protos/ is out of date: run 'make protos'" >&2; exit 1; }; done && echo "protos: up to date"

demo-model: setup ## train models/demo again from the standard library's sources
	$(PY) -m models.train_demo $(ARGS)

faults: setup ## injure the running product; writes docs/performance/faults.{md,json,svg} (docs/reliability.md)
	$(PY) -m tests.faults --out docs/performance $(ARGS)

soak: setup ## random faults under load for 30 minutes (ARGS="--minutes N"); nothing may grow
	$(PY) -m tests.faults.soak --out docs/performance $(ARGS)

bench: setup ## measure expertfleet beside its peers, 25 minutes on two cores; writes docs/performance/bench.{md,json,svg}
	$(PY) -m benchmarks.run $(ARGS)

bench-peers: setup ## make the peers' environments in .bench (vLLM 2.3 GB; llama.cpp is compiled)
	$(PY) -m benchmarks.peers install $(ARGS)

TARGETS := bench-delay bench-gateway bench-hot-expert bench-steady-cost bench-session-restore bench-wide
bench-targets: bench $(TARGETS) ## measure all that docs/performance.md has a target for, an hour and a half

bench-dispatch: setup ## measure one MoE layer over gRPC beside in process
	$(PY) -m benchmarks.dispatch $(ARGS)

bench-wide: setup ## serve one layer of 8x22B's width on eight workers; needs 6 GB of disk and memory
	$(PY) -m benchmarks.wide $(ARGS)

bench-attention: setup ## measure native attention beside torch's
	$(PY) -m benchmarks.attention $(ARGS)

bench-experts: setup ## measure one expert's native kernels beside torch's
	$(PY) -m benchmarks.experts $(ARGS)

bench-long-context: setup ## measure decoding at 1k to 64k tokens of context
	$(PY) -m benchmarks.long_context $(ARGS)

bench-delay: setup ## measure micro-batches in flight with 1 and 5 ms of network delay
	$(PY) -m benchmarks.delay $(ARGS)

bench-gateway: setup ## measure what gateway and Ray add to a token
	$(PY) -m benchmarks.gateway $(ARGS)

bench-hot-expert: setup ## throw 70 % of the tokens onto one expert; writes docs/performance/hot-expert.md
	$(PY) -m benchmarks.hot_expert $(ARGS)

bench-steady-cost: setup ## measure what metrics, traces and checkpoints cost all the time
	$(PY) -m benchmarks.steady_cost $(ARGS)

bench-session-restore: setup ## measure restoring a session's KV beside computing it again
	$(PY) -m benchmarks.session_restore $(ARGS)

bench-autoscale: setup ## a compressed day with and without the autoscaler, 20 minutes
	$(PY) -m benchmarks.autoscale_trace --real $(ARGS)

bench-gpu: setup ## measure this machine's GPU at the widths of 8x7B and 8x22B
	$(PY) -m benchmarks.gpu $(ARGS)

bench-perplexity: setup ## measure what quantised weights cost in quality
	$(PY) -m benchmarks.perplexity $(ARGS)

bench-plan: setup ## measure how well `expertfleet plan` predicts decode steps here
	$(PY) -m benchmarks.plan_error $(ARGS)

clean: ## remove what set-up and runs have made
	rm -rf .venv .expertfleet .mypy_cache .ruff_cache .pytest_cache *.egg-info build dist
