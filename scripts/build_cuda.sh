#!/usr/bin/env bash
# Build the CUDA operators with nvcc: scripts/build_cuda.sh [LIBRARY]. ARCHS="90" builds for one architecture only.
set -euo pipefail
cd "$(dirname "$0")/.."
library=${1:-vllm_nld/native/libnld_cuda.so}
mkdir -p "$(dirname "$library")"
codes=()
for arch in ${ARCHS:-80 90 100}; do codes+=(-gencode "arch=compute_$arch,code=sm_$arch"); done
exec "${NVCC:-nvcc}" -O3 -std=c++17 -Werror all-warnings -Xcompiler -fPIC,-Wall,-Wextra -t"${THREADS:-2}" "${codes[@]}" -shared \
    csrc/cuda/*.cu -o "$library"
