# Needs make, git and Python 3.11 or newer; installs everything else into .venv, uv too when there is none on PATH.

PORT ?= 8000
PYTHON ?= python3
PROJECT := {{cookiecutter.project_slug}}
UV := $(shell uv --version >/dev/null 2>&1 && command -v uv || echo .venv/bin/uv)

.PHONY: run test test-delivered check bench pictures release

# Bakes the default project and serves it. A second run keeps the project's database, lock file and environment.
run: .venv/.ready
	@.venv/bin/cookiecutter . --no-input --default-config --overwrite-if-exists --output-dir build >/dev/null
	@$(MAKE) --no-print-directory -C build/task-service run PORT=$(PORT) UV='$(abspath $(UV))'

test: .venv/.ready
	cd '$(PROJECT)' && TASKFLOW_TESTS=all '$(CURDIR)/.venv/bin/python' -m pytest -n 2
	.venv/bin/python -m pytest -n 2

# What uses a running task manager, once more with a delivery: on PostgreSQL by RabbitMQ, on Redis by Redis.
DELIVERED := api cancel context examples idempotency manager pages queues schedules_api testing_support timeout

test-delivered: .venv/.ready
	cd '$(PROJECT)' && for store in postgres redis; do \
	    '$(CURDIR)/.venv/bin/python' -m pytest -p tests.taskflow.delivered --store $$store \
	        $(DELIVERED:%=tests/taskflow/test_%.py) || exit 1; \
	done

check: .venv/.ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy hooks/pre_gen_project.py
	.venv/bin/mypy hooks/post_gen_project.py
	.venv/bin/mypy tests release.py
	MYPYPATH='$(PROJECT)' .venv/bin/mypy benchmarks
	cd '$(PROJECT)' && '$(CURDIR)/.venv/bin/mypy'

bench: .venv/.ready
	.venv/bin/python -m benchmarks

# Of the dashboard, for README and documents; needs a Chromium on PATH.
pictures: .venv/.ready
	PYTHONPATH='$(PROJECT)' .venv/bin/python -m benchmarks.pictures

# make release VERSION=0.2.0: changelog, tag, archive and checksum; pushes nothing.
release:
	@$(PYTHON) release.py '$(VERSION)'

# The template's tools and, so that the project's directory is linted, typed and tested in place, its dependencies too.
.venv/.ready: pyproject.toml $(PROJECT)/pyproject.toml | $(UV)
	@echo 'Preparing .venv (this once) ...'
	@test -x .venv/bin/python || $(UV) venv --quiet --python '>=3.11' .venv
	@.venv/bin/python -c 'import sys, tomllib; \
	    project = tomllib.load(sys.stdin.buffer); \
	    print(*project["project"]["dependencies"], *project["dependency-groups"]["dev"], sep="\n")' \
	    <'$(PROJECT)/pyproject.toml' >.venv/requirements.txt
	@$(UV) pip install --quiet --python .venv/bin/python --group dev --requirement .venv/requirements.txt
	@touch $@

.venv/bin/uv:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@echo 'No uv on PATH: installing it into .venv ...'
	@want=$$($(PYTHON) -c 'import sys; print(sys.version_info[:2])'); \
	if [ -e .venv ] && [ "$$(.venv/bin/python -c 'import sys; print(sys.version_info[:2])' 2>/dev/null)" != "$$want" ]; then \
	    echo '.venv was made by another Python, or by one that is gone: it is made anew.'; rm -rf .venv; \
	fi
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install --quiet 'uv>=0.13,<1'
