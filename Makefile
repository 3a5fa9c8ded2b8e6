# Two commands: `make serve` and `make test`. Each needs only Python and make, and sets up .venv itself.

CONFIG = configs/demo.yaml
PYTHON ?= python3
BIN := .venv/bin
NODE := tests/http/js tests/k8s tests/playground
NODE_MODULES := $(NODE:=/node_modules)

.PHONY: help serve test slow soak check format docs benchmark versions lock alerts clean

help: ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# Only when given to make: shells and platforms have variables of these names too.
option = $(if $(filter command,$(origin $(1))),$(2) $($(1)))

serve: .venv/serve.stamp ## Serve CONFIG (configs/demo.yaml) on HOST:PORT (127.0.0.1:8000) until Ctrl-C; TLS=1 by https; VERBOSE=1 shows Ray's log
	@exec $(BIN)/python -m serve_app serve $(CONFIG) $(call option,HOST,--host) $(call option,PORT,--port) $(call option,METRICS_PORT,--metrics-port) $(if $(call option,TLS),--tls) $(if $(call option,VERBOSE),--verbose)

# Two processes share the tests that start no Ray. A server on Ray needs all cores for itself.
test: .venv/dev.stamp $(NODE_MODULES) ## Run the tests
	$(BIN)/pytest -m "not slow and not soak" -n 2 --dist loadfile --ignore tests/serve
	$(BIN)/pytest -m "not slow and not soak" tests/serve

slow: .venv/dev.stamp $(NODE_MODULES) ## Run the tests that take long: faults, load, the playground, the demo, helpers
	$(BIN)/pytest -m "slow and not soak" -n 2 --dist loadfile tests/unit tests/http
	$(BIN)/pytest -m "slow and not soak" --ignore tests/unit --ignore tests/http

soak: .venv/dev.stamp $(NODE_MODULES) ## Run the tests that repeat the same many times, and those of a whole cluster
	$(BIN)/pytest -m soak

check: .venv/dev.stamp ## Lint; check formatting, types, spelling and sentences
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/pytest -q tests/unit/test_words.py

format: .venv/dev.stamp tests/playground/node_modules ## Format the code and mend what can be mended
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	cd tests/playground && npx prettier --config package.json --write ../../serve_app/playground ../../serve_app/reference

docs: .venv/dev.stamp ## Write the generated pages of docs/reference
	$(BIN)/python -m tests.docs.reference

benchmark: .venv/dev.stamp ## Measure speed on this machine and print tables
	$(BIN)/python -m tests.benchmarks.prior
	$(BIN)/python -m tests.benchmarks.speculation
	$(BIN)/python -m tests.benchmarks.decoder
	$(BIN)/python -m tests.benchmarks.server
	$(BIN)/python -m tests.benchmarks.overhead
	$(BIN)/python -m tests.benchmarks.edge
	$(BIN)/python -m tests.benchmarks.helpers
	$(BIN)/python -m tests.benchmarks.telemetry
	$(BIN)/python -m tests.benchmarks.lifecycle
	$(BIN)/python -m tests.benchmarks.jobs
	$(BIN)/python -m tests.benchmarks.people
	$(BIN)/python -m tests.benchmarks.kernels

versions: .venv/dev.stamp ## Run the families' tests on other versions of transformers and print a table
	$(BIN)/python -m tests.versions

# The local part of a version ("+cpu") says which build of torch this machine has, not which one to have.
lock: .venv/dev.stamp ## Choose the newest versions that pyproject.toml allows and write them down
	cd $(CURDIR) && for lock in "requirements.lock" "requirements-dev.lock --extra=dev"; do \
	  $(BIN)/pip-compile --quiet --upgrade --strip-extras --no-emit-index-url --no-emit-find-links \
	    --no-emit-trusted-host --no-header --annotation-style=line pyproject.toml --output-file $$lock || exit; \
	done
	sed -i 's/+cpu\b//' requirements.lock requirements-dev.lock

# Prometheus's operator wants its rules as a resource of Kubernetes, which kustomize cannot make of a plain file.
alerts: ## Write k8s/monitoring/alerts.yaml down as a PrometheusRule too
	@printf '%s\n' '# Written by `make alerts`: change alerts.yaml.' 'apiVersion: monitoring.coreos.com/v1' \
	  'kind: PrometheusRule' 'metadata:' '  name: glm-image' '  namespace: glm-image' '  labels:' \
	  '    app.kubernetes.io/part-of: glm-image' 'spec:' > k8s/monitoring/prometheusrule.yaml
	@sed '/^#/d; s/^./  &/' k8s/monitoring/alerts.yaml >> k8s/monitoring/prometheusrule.yaml

clean: ## Remove the environment and the caches
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache *.egg-info

.venv/serve.stamp: requirements.lock pyproject.toml
	$(call install,requirements.lock)

.venv/dev.stamp: requirements-dev.lock pyproject.toml
	$(call install,requirements-dev.lock)
	@touch .venv/serve.stamp

%/node_modules: %/package-lock.json
	@if command -v npm >/dev/null; then npm ci --silent --prefix $* && touch $@; \
	else echo "npm is missing: the tests in $* that need it are skipped."; fi

# Of pip's many lines: on a terminal a count that overwrites itself, then one line. pip's errors go to stderr.
PROGRESS = line=; n=0; while read -r word rest; do case $$word in \
	Collecting|Requirement) n=$$((n + 1)); ! test -t 1 || { line=open; printf '\rPackages: %d' $$n; } ;; \
	Installing) $${line:+echo}; line=; echo "Unpacking them." ;; \
	ended) $${line:+echo}; exit $$rest ;; esac; done

# A torch that is in .venv already and of the locked version, PyTorch's CPU build say, is kept.
define install
	@echo "Installing $(1) into .venv; this takes a few minutes."
	@$(PYTHON) -m venv .venv
	@{ $(BIN)/pip install --disable-pip-version-check --progress-bar off -r $(1); echo "ended $$?"; } \
	  | { $(PROGRESS); }
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@
endef
