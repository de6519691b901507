#!/usr/bin/env bash
# Check and measure everything that needs an NVIDIA GPU, in eight minutes: docs/developer/gpu.md.
#   scripts/gpu_check.sh --out DIR     PYTHON names the interpreter that has vLLM (python3 by default)
#   scripts/gpu_check.sh --dry-run     every step on a CPU, tiny, without the GPU's kernels
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root/benchmarks:$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m gpu_check "$@"
