#!/usr/bin/env bash
# Run the tests (all of them, or what the arguments select: scripts/test.sh -m unit). Sets up .venv first if needed.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VLLM_NLD_VENV:-.venv}
[ -x "$venv/bin/vllm-nld" ] || scripts/setup.sh --no-demo
exec "$venv/bin/python" -m pytest "$@"
