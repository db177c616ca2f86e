# The two commands: `make demo` and `make test`. Everything else is `make help`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PINS := setup.cfg pyproject.toml constraints.txt conf/jars.toml
EXIT ?=
PORT ?= 0
LANES := -n 4 --dist loadgroup --no-loadscope-reorder  # workers, which wait much; who runs what: tests/support/lanes.py

.PHONY: test-long bench-growth bench-files bench-matching help demo viewer test lint unit bench bench-landing bench-policy bench-retrieve bench-query bench-web fuzz hdfs setup clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 16

demo: $(VENV)/.ready ## set up, then serve an archive, send it sample studies, extract, find, count (EXIT=1 stops at the end)
	@$(BIN)/python -m sphere.conf.viewer || true  # without npm there is no viewer, and all else
	@$(BIN)/python -m sphere.demo $(if $(EXIT),--exit) --port $(PORT)

viewer: $(VENV)/.ready ## fetch the OHIF viewer, shown under /viewer; needs npm
	@$(BIN)/python -m sphere.conf.viewer

test: $(VENV)/.ready-test ## set up, then every check and test (SPHERE_REQUIRE_ALL=1: a missing tool is a failure)
	@# beside each other: programs of others, HDFS, Spark's classes and bytecode for the hundreds of processes that are started, lint
	@$(BIN)/python -m tests.support.install & tools=$$!; $(BIN)/python -m sphere.conf.jars hdfs & jars=$$!; \
	$(BIN)/python -m sphere.jobs.class_archive >/dev/null & \
	($(BIN)/python -m compileall -q sphere tests/support tests/bench; $(BIN)/python -m pytest --collect-only -q >/dev/null) & \
	$(MAKE) --no-print-directory lint; lint=$$?; wait $$tools && wait $$jars && wait && exit $$lint
	$(BIN)/python -m pytest $(LANES) $(PYTEST)

test-long: export SPHERE_TEST_EXAMPLES ?= 10
test-long: test ## the same with 10 times as many generated examples, others with each run

unit: $(VENV)/.ready-test ## the tests that need neither Java nor servers of others
	$(BIN)/python -m pytest $(LANES) -m unit $(PYTEST)

lint: $(VENV)/.ready-test ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.ready-test ## extraction in instances/s against the naive way, 10,000 and 100,000 instances
	$(BIN)/python -m tests.bench.bench_extract $(BENCH)

bench-growth: $(VENV)/.ready-test ## one batch of 20,000 instances on catalogs of several sizes; GROWTH="--studies 4000,1000000" for 25 million
	$(BIN)/python -m tests.bench.bench_growth $(GROWTH)

bench-landing: $(VENV)/.ready-test ## C-STORE against storescp, Orthanc and pynetdicom; needs DCMTK and Orthanc
	$(BIN)/python -m tests.bench.bench_landing $(LANDING)

bench-matching: $(VENV)/.ready-test ## keys that no column holds, and fuzzy names, beside keys that have a column
	$(BIN)/python -m tests.bench.bench_matching $(MATCHING)

bench-files: $(VENV)/.ready-test ## queries without a catalog: headers/s, first and last answer, memory
	$(BIN)/python -m tests.bench.bench_files $(FILES)

bench-policy: $(VENV)/.ready-test ## what rules and the search for copies cost an instance on its way in
	$(BIN)/python -m tests.bench.bench_policy $(POLICY)

bench-query: $(VENV)/.ready-test ## C-FIND and QIDO over generated catalogs beside Orthanc with SQLite and PostgreSQL (orthanc-postgresql, orthanc-dicomweb); QUERY="--full" for 1,000,000 studies
	$(BIN)/python -m tests.bench.bench_query $(QUERY)

bench-retrieve: $(VENV)/.ready-test ## C-MOVE and C-GET against Orthanc and dcmqrscp; needs DCMTK and Orthanc
	$(BIN)/python -m tests.bench.bench_retrieve $(RETRIEVE)

bench-web: $(VENV)/.ready-test ## DICOMweb against Orthanc's plugin, and the first image in OHIF; needs orthanc-dicomweb
	$(BIN)/python -m tests.bench.bench_web $(WEB)

fuzz: $(VENV)/.ready-test ## coverage-guided fuzzing of the decoders (FUZZ="TARGET SECONDS", all 60 by default)
	$(BIN)/python -m tests.fuzz $(FUZZ)

hdfs: $(VENV)/.ready-test ## a real HDFS (one NameNode, two DataNodes) on loopback until Ctrl-C
	@$(BIN)/python -m tests.support.hdfs $(HDFS)

setup: $(VENV)/.ready-test ## the virtual environment with everything in it

define environment
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed; make PYTHON=python3.11 names one")'
@$(PYTHON) -m sphere.conf.java
@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "install it with: apt-get install python3-venv"; exit 1; }
endef
export DIST_EXTRA_CONFIG := $(CURDIR)/conf/wheels.cfg
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

$(VENV)/.ready: $(PINS)
	$(environment)
	$(PIP) -e .
	$(BIN)/python -m sphere.conf.jars spark
	@touch $@

$(VENV)/.ready-test: $(PINS)
	$(environment)
	@# beside each other: programs of others; PySpark, which is the largest, then JARs, which need it; all else that is pinned
	$(BIN)/python -m tests.support.requirements 2 $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || $(PIP) tomli
	$(PYTHON) -m tests.support.packages & packages=$$!; \
	($(PIP) pyspark && $(BIN)/python -m sphere.conf.jars spark) & spark=$$!; \
	$(PIP) --no-deps -r $(VENV)/pins-1.txt & pins=$$!; \
	$(PIP) --no-deps -r $(VENV)/pins-2.txt; others=$$?; wait $$packages; wait $$spark && wait $$pins && exit $$others
	$(PIP) -e '.[test]'
	@touch $(VENV)/.ready $@

clean: ## remove the virtual environment and what demos left
	rm -rf $(VENV) .demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
