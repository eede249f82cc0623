PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export MPLBACKEND ?= Agg
# The tests in so many processes, each with one thread.
JOBS ?= 2
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

LOWEST := .venv-lowest
NEW_ENOUGH = @$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "tnreg needs Python 3.11 or newer; set PYTHON=..."; exit 1; }

# What needs a GPU, on a machine with torch and CUDA; GPU_FLAGS="--rehearse" tries it on the CPU. It goes on
# with what is not complete.
GPU_PYTHON ?= python3
GPU_FLAGS ?=
# What such a machine may lack, with what it is compared to.
GPU_WHEELS := tensornetwork graphviz==0.21 tyro docstring_parser==0.18.0 typeguard==4.6.1 \
	cotengra==0.8.3 autoray==0.11.0 tensorkrowch==1.1.6

.PHONY: demo test quick test-lowest coverage docs figures figure-locality check format lint types bench gpu gpu-wheels gpu-images clean

SEEDS := 1 2 3
DYNAMICS := $(foreach model,mf cp htf,$(foreach seed,$(SEEDS),runs/$(model)-$(seed)))
SWEEPS := runs/init-scale-cp/init-scale.png

demo: $(READY)
	$(BIN)/tnreg demo --out runs/demo

test: $(READY)
	$(PYTEST)

# Without the tests marked slow: processes, exporters, examples, experiments.
quick: $(READY)
	$(PYTEST) -m "not slow"

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict -f docs/mkdocs/mkdocs.yml

# The three dynamics at the published settings: half an hour beside other work on two cores. What is in
# runs/ is not trained again, and what was killed goes on.
figures: $(DYNAMICS) $(SWEEPS)
	mkdir -p runs/figures
	$(BIN)/tnreg plot runs/mf-1 runs/cp-1 runs/htf-1 --figure runs/figures/dynamics.png
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
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/seeing_far.py --only main

# The tests with the lowest versions that pyproject.toml allows. The extra onnx asks for a newer torch than
# tnreg itself and is left out, and with it the tests that write ONNX files. torch 2.9 itself warns where it
# compiles a step and loads an exported network, which is an error in tests. What came before newer pyparsing
# and scipy warns of them.
ONNX := cli.py::test_run_convac cli.py::test_export experiments.py::test_demo experiments.py::test_convac \
	export.py::test_exported_grids export.py::test_what_is_refused
test-lowest: $(LOWEST)/.ready
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(LOWEST)/bin/python -m pytest -n $(JOBS) --dist worksteal \
		-k "not onnx and not compiled_training and not pt2-deep" $(ONNX:%=--deselect tests/test_%)

$(LOWEST)/.ready: pyproject.toml tests/lowest.py
	$(NEW_ENOUGH)
	$(PYTHON) -m venv $(LOWEST)
	{ printf "pyparsing<3.3\nscipy<1.16\n"; $(LOWEST)/bin/python tests/lowest.py core data images scale dev; } > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --disable-pip-version-check -q -c $(LOWEST)/lowest.txt -e ".[data,images,scale,dev]"
	touch $@

# Lines of tnreg/ that the tests run, in the processes that they start as well, and the lines that they do not.
coverage: $(READY)
	$(subst -m pytest,-m coverage run -m pytest,$(PYTEST))
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report

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

gpu:
	$(GPU_PYTHON) benchmarks/gpu.py --out runs/gpu $(GPU_FLAGS)

# For Python 3.12 on x86-64; gpu.py takes those that are not installed there. torchTT has no wheel: one is
# built here, without a compiler, so that its optional extension is left out.
gpu-wheels: $(READY)
	rm -rf .wheels
	$(PYTHON) -m pip download --disable-pip-version-check -q -c constraints.txt --no-deps --only-binary=:all: \
		--python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 \
		--platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d .wheels $(GPU_WHEELS)
	CC=false CXX=false $(BIN)/python -m pip wheel --disable-pip-version-check -q --no-cache-dir --no-deps \
		--no-build-isolation -w .wheels torchTT==0.5.0

# The images of figure 6, some minutes of all processors; carried along they need not be made on the GPU's machine.
gpu-images: $(READY)
	PYTHONPATH=benchmarks $(BIN)/python -m gpu_stages.pathfinder --sets runs/gpu

$(READY): pyproject.toml constraints.txt
	$(NEW_ENOUGH)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[all,dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) $(LOWEST) .wheels runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
