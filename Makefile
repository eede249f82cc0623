PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export MPLBACKEND ?= Agg
# The tests in so many processes, each with one thread.
JOBS ?= 2
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.PHONY: demo test docs figures figure-locality check format lint types bench clean

SEEDS := 1 2 3
DYNAMICS := $(foreach model,mf cp htf,$(foreach seed,$(SEEDS),runs/$(model)-$(seed)))
SWEEPS := runs/init-scale-cp/init-scale.png

demo: $(READY)
	$(BIN)/tnreg demo --out runs/demo

test: $(READY)
	$(PYTEST)

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict -f docs/mkdocs/mkdocs.yml

# The three dynamics at the published settings: half an hour beside other work on two cores. What is in
# runs/ is not trained again, and what was killed goes on.
figures: $(DYNAMICS) $(SWEEPS)
	mkdir -p runs/figures
	$(BIN)/tnreg plot runs/mf-1 runs/cp-1 runs/htf-1 --png runs/figures/dynamics.png
	$(BIN)/tnreg plot runs/htf-1
	cp runs/htf-1/rates.png runs/figures/rates.png
	cp runs/htf-1/spectra.png runs/figures/spectra.png
	cp runs/init-scale-cp/init-scale.png runs/figures/init-scale.png
	$(BIN)/python benchmarks/dynamics_runs.py $(DYNAMICS) --out runs/figures/dynamics-runs.json

runs/mf-%: | $(READY)
	$(BIN)/tnreg run dynamics --model mf --seed $* --out $@
runs/cp-%: | $(READY)
	$(BIN)/tnreg run dynamics --model cp --seed $* --out $@
runs/htf-%: | $(READY)
	$(BIN)/tnreg run dynamics --model htf --seed $* --out $@
runs/init-scale-%/init-scale.png: | $(READY)
	$(BIN)/tnreg run init-scale --model $* --out $(@D)

# Digits at four distances, three arms, five seeds: sixty trainings, goes on where it stopped.
figure-locality: $(READY)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/tnreg run locality --set digits --workers 2 --out runs/locality

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST)

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/steps.py --out benchmarks/results/steps-cpu.json
	$(BIN)/python benchmarks/dynamics.py --out benchmarks/results/dynamics-cpu.json

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "tnreg needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[all,dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
