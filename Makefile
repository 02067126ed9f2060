# make study   trains all eight methods, three seeds each, on the embedded digits and writes
#              runs/demo/report.html; more options: make study STUDY="--only sgd,atmo"
# make test    runs lint and the default tests
# make lab     opens the notebooks in JupyterLab
# make site    writes build/site/index.html: playground, executed notebooks, results, reference
# make copies  executes all notebooks on the published runs again: data/results/reading
# make colab   writes git's origin, or REPO=https://github.com/..., into the notebooks and adds "Open
#              in Colab" badges there and in the README; make colab REPO= removes both
# All but colab build .venv on first use, with uv if it is installed, else with python3 -m venv and pip.

PYTHON ?= python3
STUDY ?=
TESTS ?=
BIN := .venv/bin

.PHONY: study test browser lab site copies colab clean

study: .venv/.lab
	$(BIN)/hybrid-study --scale demo --seeds 0-2 $(STUDY)

test: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest $(TESTS)

# Test the notebooks in a real JupyterLab and Chromium, one at a time; skipped if there is no Chromium.
# In a replica of Colab's front end, after minutes of installation: make browser BROWSER="browser and slow"
BROWSER ?= browser and not slow
browser: export SCREENSHOTS ?= build/screenshots
browser: .venv/.test
	$(BIN)/pytest -n 0 -m "$(BROWSER)" -rPs

lab: .venv/.lab
	$(BIN)/jupyter lab notebooks

site: .venv/.site
	$(BIN)/python notebooks/publish.py site

copies: .venv/.site
	$(BIN)/python notebooks/publish.py copies

colab:
	@"$(PYTHON)" notebooks/stamp_colab.py $(if $(filter command,$(firstword $(origin REPO))),$(or $(REPO),--clear),$(REPO))

clean:
	rm -rf .venv

# Rebuilt when pyproject.toml changes. A half-built environment has no stamp, so make tries again.
.venv/.lab .venv/.site .venv/.test: .venv/.%: pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed; name it with: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@if command -v uv >/dev/null; then \
	  { test -x $(BIN)/python || uv venv --quiet --seed --python "$(PYTHON)" .venv; } && \
	  uv pip install --quiet --python $(BIN)/python --editable '.[$*]'; \
	elif "$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null; then \
	  { test -x $(BIN)/python || "$(PYTHON)" -m venv .venv; } && \
	  $(BIN)/python -m pip install --quiet --editable '.[$*]'; \
	else \
	  echo "This Python has no venv. On Debian or Ubuntu: apt install python3-venv. Or install uv."; exit 1; \
	fi
	@touch $@
