# Two commands do all set-up on a fresh machine: `make sweep` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)

.PHONY: help sweep test lint bench reference-reports cluster horovod system-packages clean

help:
	@echo "make sweep   install into $(VENV), run the main job, print where the report is"
	@echo "make test    install, then linters, types and all tests"
	@echo "make bench   print the speed of saih itself"
	@echo "make reference-reports  make reports/reference from results/reference, with the README's pictures"
	@echo "make cluster start a simulated Slurm cluster here and write sites/cluster.yaml and cluster-mpi.yaml; Ctrl-C stops it"
	@echo "make horovod build Horovod for the torch of $(VENV), keep the wheel in ~/.cache/saih, install it"
	@echo "make clean   remove $(VENV) and caches; jobs, results and reports stay"

sweep: $(VENV)/.installed
	$(BIN)/saih sweep --axis data,model

# Tests of what a machine lacks skip, except in CI; so CI builds Horovod too.
test: $(VENV)/.installed-test system-packages $(if $(filter true,$(CI)),horovod) lint
	$(BIN)/python -m pytest --numprocesses=4 --dist=loadfile

lint: $(VENV)/.installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/.installed-test
	$(BIN)/python -m tests.benchmarks

reference-reports: $(VENV)/.installed
	$(BIN)/python -m scripts.reference_reports

cluster: $(VENV)/.installed
	$(BIN)/python -m tests.cluster.slurm cluster

horovod: $(VENV)/.installed
	scripts/horovod.sh $(BIN)/python

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "saih needs Python 3.11 or later; say which with: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
		{ echo "this Python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[mpi,video]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[mpi,video,test]'
	@touch $@

# What tests want from Debian: taken where it can be (as root), else the tests that need it skip, and fail under CI=true.
DEBIAN := chromium hdf5-tools slurmctld slurmd slurm-client munge openmpi-bin g++
system-packages:
	@if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && \
		! { command -v chromium && command -v h5dump && command -v slurmctld && command -v munged && \
		command -v ompi_info && command -v g++; } >/dev/null; then \
		echo "installing for the tests: $(DEBIAN)"; \
		apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(DEBIAN) >/dev/null; \
	fi

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
