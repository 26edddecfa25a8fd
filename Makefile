# Needs make (3.81 or newer) and Python 3.11, 3.12 or 3.13; the folder's path may contain spaces.
# Packages run as `python -m`, not as scripts: the first line of a script breaks on long paths and on spaces.

PY := .venv/bin/python
STAMP := .venv/.installed
MOVED := $(shell [ -f $(STAMP) ] && [ "$$(cat $(STAMP))" != "$$(pwd -P)" ] && echo moved)
PYTEST := $(PY) -m pytest tests notebooks --nbval -n 2 --dist loadfile

PINS := $(if $(NEWEST),--upgrade,-c constraints.txt)

export PYTHON

.PHONY: help setup lab test test-all before-tests course book refresh generate lint clean uninstall moved
.NOTPARALLEL:

help:
	@echo 'make lab              set up, then open JupyterLab at chapter 00 (ARGS="02" for another, ARGS="--no-browser")'
	@echo 'make test             set up, lint, build the book, run all tests and chapters (make test-all: also the slow ones)'
	@echo ''
	@echo 'make setup            only the environment, in .venv; PYTHON=/path/to/python3.12 chooses the interpreter'
	@echo 'make course           run every chapter and print how long each takes'
	@echo 'make book             build the chapters as web pages, in build/book'
	@echo 'make refresh          execute the chapters and store their outputs (authors; MEASURE=1 also renews timings)'
	@echo 'make generate         renew the pictures and tables drawn from code and records (authors)'
	@echo 'make lint             ruff, mypy and the order of imports'
	@echo 'make clean            remove build products; .venv, work/ and runs/ stay'
	@echo 'make uninstall        remove .venv and the cache as well (WORK=1: also work/ and runs/)'

setup: $(STAMP)
	@:

# The stamp stores the folder of the installation and is written last: a failed, killed or moved one starts again.
$(STAMP): pyproject.toml constraints.txt $(MOVED)
	@rm -f $(STAMP)
	@if ! $(PY) -c 'import pip' 2>/dev/null; then \
	  in_range='import sys; v = sys.version_info; print("%d.%d.%d" % v[:3]); sys.exit(not (3, 11) <= v[:2] <= (3, 13))'; \
	  if [ -n "$$PYTHON" ]; then set -- "$$PYTHON"; else set -- python3 python3.13 python3.12 python3.11; fi; \
	  found=''; seen=''; \
	  for candidate in "$$@"; do \
	    if version=$$("$$candidate" -c "$$in_range" 2>/dev/null); then found=$$candidate; break; fi; \
	    seen="$$seen $$candidate is $${version:-missing or does not start};"; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "Python 3.11, 3.12 or 3.13 is needed:$$seen name one with make setup PYTHON=/path/to/python" >&2; exit 2; \
	  fi; \
	  echo "Making .venv with Python $$version"; \
	  "$$found" -m venv --clear .venv || { \
	    echo "$$found cannot make an environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }; \
	fi
	@echo 'Installing the packages into .venv: a few minutes; about 440 MB to download with a CPU build of torch,'
	@echo '  several GB with a CUDA build (notebooks/pages/install.md shows how to choose)'
	@( s=0; while sleep 15; do s=$$((s + 15)); echo "  still installing, $$s s"; done ) & sign=$$!; \
	trap 'kill $$sign 2>/dev/null' EXIT INT TERM; \
	package='.[course,book,test]'; \
	if command -v uv >/dev/null 2>&1; then \
	  of_pip() { printenv "$$2" || $(PY) -m pip config get "global.$$1" 2>/dev/null || true; }; \
	  : "$${UV_FIND_LINKS:=$$(of_pip find-links PIP_FIND_LINKS | tr -s ' \n' ',,')}"; \
	  : "$${UV_EXTRA_INDEX_URL:=$$(of_pip extra-index-url PIP_EXTRA_INDEX_URL | tr -s '\n' ' ')}"; \
	  export UV_FIND_LINKS UV_EXTRA_INDEX_URL; \
	  uv pip install -q --index-strategy unsafe-best-match --python $(PY) $(PINS) -e "$$package"; \
	else \
	  $(PY) -m pip --disable-pip-version-check install -qq --no-warn-script-location $(PINS) -e "$$package"; \
	fi
	@$(PY) -m dsmoe_lite.labs.jupyter_settings
	@pwd -P > $(STAMP)
	@echo 'Ready: make lab, make test'

lab: setup
	@$(PY) -m dsmoe_lite lab $(ARGS)

course: setup
	@$(PY) -m dsmoe_lite course $(ARGS)

book: setup
	@$(PY) -m dsmoe_lite book $(ARGS)

refresh: setup
	@$(PY) -m dsmoe_lite refresh $(if $(MEASURE),--measure) $(ARGS)

generate: setup
	@$(PY) -m dsmoe_lite.book.generated --write

lint: setup
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(PY) -c 'import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))'

before-tests: setup lint
	@$(PY) -c 'from dsmoe_lite.common.machine import find_chromium as f; f() or print("no chromium: its tests are skipped (apt install chromium)")'
	@$(PY) -m dsmoe_lite book

# pytest runs last, so that its summary ends the output; it fails if it finds no tests.
test: before-tests
	@$(PYTEST) -m 'not slow'

test-all: before-tests
	@$(PYTEST)

clean:
	@rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find src tests notebooks \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

uninstall: clean
	@if [ -n "$$DSMOE_CACHE" ]; then echo "Kept the cache you chose: $$DSMOE_CACHE"; \
	elif [ -x $(PY) ]; then $(PY) -c 'import shutil; from dsmoe_lite.common import paths; shutil.rmtree(paths.cache(), ignore_errors=True)'; fi
	@rm -rf .venv
	@if [ -n "$(WORK)" ]; then rm -rf work runs; echo 'Removed .venv, the cache, work/ and runs/'; \
	else echo 'Removed .venv and the cache; your own work stays in work/ and runs/ (make uninstall WORK=1 removes it too)'; fi
