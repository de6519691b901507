#!/usr/bin/env bash
# Run the tests: what the arguments select (scripts/test.sh -m unit), or all of them. All run in three parts, each with
# its own summaries:
#   sharing     two processes with one core each
#   starting    Ray's tests, which mostly wait for processes to start; next to them, on one core, what is one process
#   alone       the tests that compute on all cores
# Sets up .venv first if needed.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VLLM_NLD_VENV:-.venv}
[ -x "$venv/bin/vllm-nld" ] || scripts/setup.sh --no-demo
pytest=("$venv/bin/python" -m pytest)
[ $# -eq 0 ] || exec "${pytest[@]}" "$@"

ray=(tests/ray)
next_to_ray=(tests/server tests/v2)
alone=(tests/parallel tests/gpu)
elsewhere=("${ray[@]}" "${next_to_ray[@]}" "${alone[@]}")
failed=()
"${pytest[@]}" -n 2 --dist loadfile --no-loadscope-reorder "${elsewhere[@]/#/--ignore=}" || failed+=(sharing)

output=$(mktemp)
"${pytest[@]}" -n 1 "${next_to_ray[@]}" >"$output" 2>&1 &
next=$!
trap 'kill "$next" 2>/dev/null; rm -f "$output"' EXIT
"${pytest[@]}" "${ray[@]}" || failed+=(ray)
wait "$next" || failed+=("next to ray")
cat "$output"

"${pytest[@]}" "${alone[@]}" || failed+=(alone)
[ ${#failed[@]} -eq 0 ] && echo "test: all parts passed" && exit
echo "test: failed: ${failed[*]}" >&2
exit 1
