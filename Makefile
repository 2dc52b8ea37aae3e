# Every command prepares what it needs: the environment in .venv/, then the local stack in .local/.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

BIN := .venv/bin
# The shell's to expand, between quotes: a folder may have spaces and dollar signs.
LOCAL = $${EFAE_LOCAL_DIR:-.local}
# Names what is installed; another hash of pins, settings, place or Python means another set-up.
STAMP := .venv/installed-$(shell (pwd; echo "$${EFAE_PYTHON:-}"; cat constraints.txt pyproject.toml) \
    | cksum | tr ' ' '-')

OPENMOJI := $(BIN)/python -m data_pipelines.build_shards --source openmoji \
    --output s3://efae-data/openmoji-32 --resolution 32 --held-out 512

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: up ## train the quick-start model on the local stack and register it (ARGS="--training.steps 500")
	@source "$(LOCAL)/env" && $(OPENMOJI)
	@cluster/submit_job.sh "$(LOCAL)/env" jobs/train.py quickstart \
	    --tracking.report-folder "$$(cd "$(LOCAL)" && pwd)/reports" \
	    --tracking.commit "$(shell git rev-parse --short HEAD 2>/dev/null)" $(ARGS)

tune: up ## search the latent's split on the local stack and register the best (ARGS="--sweep.trials 24")
	@source "$(LOCAL)/env" && $(OPENMOJI)
	@cluster/submit_job.sh "$(LOCAL)/env" jobs/tune.py quickstart_trial \
	    --tracking.report-folder "$$(cd "$(LOCAL)" && pwd)/reports" \
	    --tracking.commit "$(shell git rev-parse --short HEAD 2>/dev/null)" $(ARGS)

bench: up ## compare level exact with dense twins at one budget (ARGS="--cpu-seconds 30")
	@source "$(LOCAL)/env" && $(OPENMOJI) && $(BIN)/python -m benchmarks.ablate --preset quickstart \
	    --seeds 1 --variants exact none "exact, narrow" "none, narrow" $(ARGS)

bench-check: $(STAMP) ## measure the GPU and compare with benchmarks/results (ARGS="--only steps")
	@$(BIN)/python -m benchmarks.gpu --check --output "$(LOCAL)/gpu.json" $(ARGS)

# Two lanes at once: tests on the servers, which mostly wait for their processes, and all others.
# The others have a process of their own: the stack's variables would send their work to its Ray.
QUICK := not gpu and not browser and not slow
SERVERS = $(shell grep -rlE 'mark\.(s3|ray)\b' tests --include='test_*.py' | sort)
test: $(STAMP) ## run the tests but the slow ones (ARGS="tests/unit -k latent")
ifdef ARGS
	@$(BIN)/python -m pytest $(ARGS)
else
	@log=$$(mktemp); failed=0; lane=; \
	trap '[ -z "$$lane" ] || kill -- -$$lane 2>/dev/null || true; rm -f "$$log"' EXIT; \
	set -m; \
	$(BIN)/python -m pytest -m "not s3 and not ray and $(QUICK)" >"$$log" 2>&1 & \
	lane=$$!; set +m; \
	$(BIN)/python -m pytest -m "(s3 or ray) and $(QUICK)" $(SERVERS) || failed=$$?; \
	wait $$lane || failed=$$?; \
	lane=; cat "$$log"; exit $$failed
endif

demo: $(STAMP) ## build the page that flips latents in a browser, and serve it (ARGS="--compare URI")
	@$(BIN)/python jobs/export.py --model builtin:openmoji-32 --format page \
	    --output "$(LOCAL)/demo" --credit "The model was trained on drawings from OpenMoji." $(ARGS)
	@echo "the page; Ctrl-C ends its server:"
	@$(BIN)/python -u -m http.server 0 --bind 127.0.0.1 --directory "$(LOCAL)/demo"

test-all: $(STAMP) ## run the slow tests, too (ARGS="tests/integration/test_chaos.py")
ifdef ARGS
	@$(BIN)/python -m pytest -m "not gpu and not browser" $(ARGS)
else
	@failed=0; \
	$(BIN)/python -m pytest -m "not gpu and not browser and not s3 and not ray" || failed=$$?; \
	$(BIN)/python -m pytest -m "not gpu and (s3 or ray)" || failed=$$?; \
	exit $$failed
endif

lint: $(STAMP) ## check format, style, types and the direction of imports
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/pyright
	@$(BIN)/lint-imports --no-logo

format: $(STAMP) ## rewrite the code in the house format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

up: $(STAMP) ## start the local stack: S3, MLflow, Ray head
	@$(BIN)/python -m cluster.local_stack up

down: ## end the local stack; its data stay
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m cluster.local_stack down; fi

ui: up ## print the addresses of MLflow and the Ray dashboard
	@$(BIN)/python -m cluster.local_stack ui

clean: down ## end the stack, remove the environment and all caches; data in .local/ stay
	@rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -prune -exec rm -rf {} +

$(STAMP):
	@cluster/set_up.sh .venv
	@rm -f .venv/installed-*
	@touch $@

.PHONY: help train tune bench bench-check demo test test-all lint format up down ui clean
