# make demo                        generated shop -> recommendations from a real Triton, on CPU
# make demo DATA=path/to/dataset   the same on real data
# make test                        lint, types and tests: what CI runs
# make test-fast                   the tests of model, ranking, training and evaluation, for the inner loop (a minute)
# make test-set-a                  the tests on the older pins, those of NVIDIA's Merlin containers
# make test-floor                  the core's tests on the oldest versions that pyproject.toml admits (Python 3.10; 3 GB)
# make test-newest                 the same on the newest releases (Python 3.13; 3 GB)
# make test-cpus                   the tests that compare floats, with the kernels of other processors (30 minutes)
# make mutants [ONLY=training]     breaks one behaviour at a time and prints what no test notices (half an hour)
# make bench-quality DATA=… RECIPE=default SEEDS=3    quality over seeds; SUBSET=FILE, MODALITY="text=FILE image=FILE"
# make bench-serving [BUNDLE=…]   served latency, throughput, start, memory, exact top-50 of 1M items (20 minutes)
# make bench-etl ROWS=1000000   ETL beside stock NVTabular operators, pandas and polars; STOCK_ROWS=200000 caps the stock run
# make bench-train [DATA=…] [RELEASE=…]   training speed beside the authors' release and T4R's XLNet (10 minutes)
# make gpu-check [PARTS="etl train rank serve"] [ETL_PYTHON=…]   one GPU, at most 8 minutes: results as on the CPU, and how fast (docs/howto/gpu.md)
# make sbom   writes the software bill of materials of the environment (CycloneDX) to build/sbom.cdx.json
# make docs   writes docs/reference.md from the code, measured numbers from their files, and builds the site into build/site
# make lint | format | clean
# Settings: PYTHON (python3.11), VENV (.venv), DATA, OUT (work/demo), TESTS (tests), JOBS (cores + 1, at most 8), PYTEST_ARGS

PYTHON ?= python3.11
VENV ?= .venv
VENV_A ?= .venv-a
PYTHON_FLOOR ?= python3.10
PYTHON_NEWEST ?= python3.13
DATA ?=
OUT ?= work/demo
TESTS ?= tests
RECIPE ?= default
SEEDS ?= 3
SUBSET ?=
MODALITY ?=
NAME ?=
PYTEST_ARGS ?=
ONLY ?=
PARTS ?=
ETL_PYTHON ?=
# One more than the cores: a quarter of the time of the tests is waiting, for servers and processes that start.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n + 1 : 8)))
PYTEST = python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)
FAST = tests/unit tests/equations tests/properties tests/evaluation tests/recipes $(addprefix --ignore tests/unit/,$(TRAININGS))
TRAININGS = test_training.py test_selection.py test_training_resume.py test_training_options.py test_cold_start.py

# Merlin 23.8 supports the classic dask.dataframe only.
export DASK_DATAFRAME__QUERY_PLANNING := False
export TOKENIZERS_PARALLELISM := false
# torch's threads sleep while they wait for each other, GNU's after some 20 microseconds: spinning, they fight for a core
# that another process needs.
export OMP_WAIT_POLICY := passive
export GOMP_SPINCOUNT := 2000
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-fast test-set-a test-floor test-newest test-cpus mutants bench-etl bench-quality bench-serving bench-train gpu-check sbom docs lint types format clean FORCE

help:
	@sed -n '/^# /s/^# //p;/^$$/q' Makefile

# `.installing` is the first thing that an installation writes and `.installed`, which it becomes, the last. A folder with the first is
# the rest of an interrupted installation and is made anew; with the second, changed requirements are installed on top; a folder with
# neither is somebody's own and is left alone.
install: $(VENV)/.installed

$(VENV)/.installed: requirements/set-b.txt requirements/merlin-b.txt requirements/check_platform.py pyproject.toml
	@$(call check_python)
	@$(call fresh_venv,$(VENV))
	@echo "==> installing pinned requirements into $(VENV) (7 GB with the CUDA libraries of PyPI's torch, 2 GB with torch for CPUs; minutes)"
	@$(VENV)/bin/python -m pip install -q -r requirements/set-b.txt
	@echo "==> installing Merlin without its pandas bound (under a minute)"
	@$(VENV)/bin/python -m pip install -q --no-deps -r requirements/merlin-b.txt
	@$(VENV)/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	@mkdir -p $(VENV)/etc/dask && cp requirements/missrec-dask.yaml $(VENV)/etc/dask/ # an editable install copies no data files
	@mv $(@D)/.installing $@ && touch $@

$(VENV_A)/.installed: requirements/set-a.txt requirements/check_platform.py pyproject.toml
	@$(call check_python)
	@$(call fresh_venv,$(VENV_A))
	@echo "==> installing the older pins into $(VENV_A) (7 GB, 2 GB with torch for CPUs; minutes)"
	@$(VENV_A)/bin/python -m pip install -q -r requirements/set-a.txt
	@$(VENV_A)/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	@mkdir -p $(VENV_A)/etc/dask && cp requirements/missrec-dask.yaml $(VENV_A)/etc/dask/
	@mv $(@D)/.installing $@ && touch $@

# The newest releases are taken anew at every run.
.venv-floor/.installed: requirements/floor.txt pyproject.toml
.venv-newest/.installed: requirements/newest.txt pyproject.toml FORCE
.venv-floor/.installed: PYTHON = $(PYTHON_FLOOR)
.venv-newest/.installed: PYTHON = $(PYTHON_NEWEST)
.venv-floor/.installed .venv-newest/.installed:
	@"$(PYTHON)" -c "" || { echo "$(PYTHON) was not found, or does not start; name another: PYTHON_FLOOR= or PYTHON_NEWEST=." >&2; exit 2; }
	@$(call fresh_venv,$(@D))
	@echo "==> installing $< into $(@D)"
	@$(@D)/bin/python -m pip install -q --upgrade -r $<
	@$(@D)/bin/python -m pip install -q --no-deps -e .
	@mv $(@D)/.installing $@ && touch $@

demo: $(VENV)/.installed
	@$(VENV)/bin/missrec demo $(if $(DATA),--data "$(DATA)") --out "$(OUT)"

test: lint
	@echo "==> tests"
	@$(VENV)/bin/$(PYTEST) $(TESTS)

test-fast: $(VENV)/.installed
	@$(VENV)/bin/$(PYTEST) -m "not triton and not ddp and not slow" $(FAST)

docs: $(VENV)/.installed
	@$(VENV)/bin/python docs/reference.py
	@$(VENV)/bin/python docs/measured.py
	@echo "==> building the site"
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet
	@echo "build/site/index.html"

bench-quality: $(VENV)/.installed
	@$(VENV)/bin/python -m benchmarks.quality.bench --data "$(DATA)" --recipe $(RECIPE) --seeds $(SEEDS) $(if $(SUBSET),--interactions $(SUBSET)) \
	  $(foreach pair,$(MODALITY),--modality $(pair)) $(if $(NAME),--name $(NAME))

test-set-a: $(VENV_A)/.installed
	@echo "==> tests on the older pins"
	@$(VENV_A)/bin/$(PYTEST) $(TESTS)

test-floor test-newest: test-%: .venv-%/.installed
	@$(<D)/bin/python -m benchmarks.floor --name $* --jobs $(JOBS)

test-cpus: $(VENV)/.installed
	@$(VENV)/bin/python -m benchmarks.cpus

mutants: $(VENV)/.installed
	@$(VENV)/bin/python -m tests.mutants.run --jobs $(JOBS) --only "$(ONLY)"

bench-etl: $(VENV)/.installed
	@$(VENV)/bin/python -m pip install -q -r requirements/bench.txt
	@$(VENV)/bin/python -m benchmarks.speed.etl --rows $(or $(ROWS),1000000) --stock-rows $(or $(STOCK_ROWS),200000)

bench-train: $(VENV)/.installed
	@$(VENV)/bin/python -m benchmarks.speed.train $(if $(DATA),--data "$(DATA)") $(if $(RELEASE),--release "$(RELEASE)")

bench-serving: $(VENV)/.installed
	@$(VENV)/bin/pip install -q -r requirements/bench.txt
	@$(VENV)/bin/python -m benchmarks.speed.serving --hnsw $(if $(BUNDLE),--bundle "$(BUNDLE)") $(if $(THREADS),--threads $(THREADS))

gpu-check: $(VENV)/.installed
	@$(VENV)/bin/python -m benchmarks.gpu_check $(PARTS) $(if $(ETL_PYTHON),--etl-python "$(ETL_PYTHON)")

# The tool has an environment of its own: it would list itself.
sbom: $(VENV)/.installed
	@test -x .venv-sbom/bin/cyclonedx-py || { "$(PYTHON)" -m venv .venv-sbom && .venv-sbom/bin/python -m pip install -q -r requirements/sbom.txt; }
	@mkdir -p build
	@.venv-sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o build/sbom.cdx.json $(VENV)/bin/python
	@.venv-sbom/bin/python requirements/check_sbom.py build/sbom.cdx.json requirements/set-b.txt requirements/merlin-b.txt

lint: $(VENV)/.installed types
	@echo "==> lint"
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/ruff format --check . || { echo "these are not formatted; run: make format" >&2; exit 1; }

types: $(VENV)/.installed
	@echo "==> types"
	@$(VENV)/bin/mypy -p missrec_t4r
	@$(VENV)/bin/mypy workflows/*.py

format: $(VENV)/.installed
	@$(VENV)/bin/ruff check --quiet --fix .
	@$(VENV)/bin/ruff format --quiet .

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find missrec_t4r workflows triton_models tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
	@echo "kept: $(VENV), $(VENV_A) and work/; remove them by hand"

define check_python
"$(PYTHON)" -c "" 2>/dev/null || { echo "$(PYTHON) was not found, or does not start; expected: Python 3.11. \
Install it (Debian 12: apt-get install python3.11-venv libpython3.11), or name another: make PYTHON=/path/to/python3.11." >&2; exit 2; }; \
"$(PYTHON)" requirements/check_platform.py || exit 2
endef

define fresh_venv
if [ -e $(1)/.installed ]; then mv $(1)/.installed $(1)/.installing; \
elif [ -e $(1) ] && [ ! -e $(1)/.installing ]; then echo "$(1) exists, but not by this Makefile; expected: a name of its own. \
Remove it, or name another: make VENV=.venv-missrec." >&2; exit 2; \
else echo "==> creating $(1)"; rm -rf $(1) && mkdir -p $(1) && touch $(1)/.installing && "$(PYTHON)" -m venv $(1); fi
endef
