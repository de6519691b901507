#!/usr/bin/env bash
# Run the tests: what the arguments select (scripts/test.sh -m unit), or all of them. All run in two parts, each with
# its own summary: two processes with one core each, then, one by one, the tests that need the whole machine.
# Sets up .venv first if needed.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VLLM_NLD_VENV:-.venv}
[ -x "$venv/bin/vllm-nld" ] || scripts/setup.sh --no-demo
[ $# -eq 0 ] || exec "$venv/bin/python" -m pytest "$@"
failed=()
"$venv/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not alone" || failed+=("sharing the machine")
"$venv/bin/python" -m pytest -m alone || failed+=("alone")
[ ${#failed[@]} -eq 0 ] && echo "test: both parts passed" && exit
echo "test: failed: ${failed[*]}" >&2
exit 1
