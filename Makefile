# The two commands: `make demo`, `make test`. Each sets up what it needs first (tools/bootstrap; a second run is quick).

SHELL := /bin/sh
BIN := .venv/bin
# Building images and running machines needs root; nothing else does. Root leaves no caches behind in the work tree.
AS_ROOT := $(shell [ "$$(id -u)" = 0 ] || echo sudo) env PYTHONDONTWRITEBYTECODE=1
JOBS := 2
SECONDS := 60
TARGETS := answers channel control core disk envelopes frames messages spec

.DEFAULT_GOAL := help
# One after the other: the linters before the tests, the quick tests before the machines.
.NOTPARALLEL:
.PHONY: help setup python demo demo-openstack test lint unit fuzz model vm vm-long openstack-lab openstack-lab-down test-openstack test-openstack-faults \
	test-ansible clean

help:
	@echo 'make demo    the whole story on real machines, then a summary'
	@echo 'make test    linters, types, unit tests, simulation, tests on real machines'
	@echo 'make lint | unit | vm    the parts of make test'
	@echo 'make vm-long             four real machines that trust no host: minutes of boot on a small machine'
	@echo 'make model   check the models of the protocol (TRAIL=setting: show one and its violation)'
	@echo 'make openstack-lab       two real OpenStack clouds on this machine (CLOUDS="lisbon passau scale", LAB=directory)'
	@echo 'make demo-openstack      the story of make demo over both of them and the local libvirt'
	@echo 'make openstack-lab-down  stop them'
	@echo 'make test-openstack      tests against them (test-openstack-faults: with calls spoilt, half an hour and more)'
	@echo 'make fuzz    every decoder for SECONDS=60, guided by coverage (docs/fuzzing.md)'
	@echo 'make test-ansible        the Ansible collection on a Debian host made for it'
	@echo 'make setup   only install what is needed'
	@echo 'make clean   remove .venv and caches'

setup:
	@tools/bootstrap

python:
	@tools/bootstrap --no-daemons

demo: setup
	$(AS_ROOT) $(BIN)/cloudfit demo

test: lint unit vm

lint: python
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: python
	$(BIN)/pytest -n $(JOBS) -m 'not vm and not image and not openstack and not ansible and not long'

fuzz: python
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/pip install --quiet -e '.[fuzz]'
	for target in $(TARGETS); do $(BIN)/python -m tests.fuzz $$target --seconds $(SECONDS) || exit 1; done

model: python
	$(if $(TRAIL),$(BIN)/python -m tests.model.spin $(TRAIL),$(BIN)/pytest -n $(JOBS) tests/model)

vm: setup
	$(AS_ROOT) $(BIN)/pytest -p no:cacheprovider -m 'vm or image'

vm-long: setup
	$(AS_ROOT) $(BIN)/pytest -p no:cacheprovider -m long

# Packages for it come by apt at the first time: minutes. `$(LAB_COMMAND) status` says what runs, `purge` removes it.
CLOUDS := lisbon passau
OPENSTACK_TESTS := tests/openstack
LAB := /var/lib/cloudfit-lab
LAB_COMMAND = $(AS_ROOT) $(BIN)/python -m tests.openstack.lab --home $(LAB)

openstack-lab: setup
	$(LAB_COMMAND) --clouds $(CLOUDS) -- up

openstack-lab-down: python
	$(LAB_COMMAND) -- down

demo-openstack: openstack-lab
	$(AS_ROOT) OS_CLIENT_CONFIG_FILE=$(LAB)/clouds.yaml $(BIN)/cloudfit demo --openstack $(LAB)/ledger.yaml

test-openstack: openstack-lab
	$(AS_ROOT) CLOUDFIT_LAB=$(LAB) $(BIN)/pytest -p no:cacheprovider -m 'openstack and not faults' $(OPENSTACK_TESTS)

test-openstack-faults: openstack-lab
	$(AS_ROOT) CLOUDFIT_LAB=$(LAB) $(BIN)/pytest -p no:cacheprovider -m faults

test-ansible: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,ansible]'
	$(AS_ROOT) $(BIN)/pytest -p no:cacheprovider -m ansible tests/ansible/test_collection.py tests/ansible/test_agent_role.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist *.egg-info
	find cloudfit_orchestrator tests images -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
