#!/usr/bin/env bash
# Run the tests: what the arguments select (scripts/test.sh -m unit), or all of them. All run in two parts:
#   most tiers   two processes with one core each; next to them Ray's tests, which wait a lot and have precedence: their
#                clients send requests until a replica has started, so the longer they take, the more they compute
#   alone        the tests that compute on all cores at once
# Sets up .venv first if needed.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VLLM_NLD_VENV:-.venv}
[ -x "$venv/bin/vllm-nld" ] || scripts/setup.sh --no-demo
pytest=("$venv/bin/python" -m pytest)
export PYTHONDONTWRITEBYTECODE= # containers set it; then each of a hundred processes would compile what the first did
[ $# -eq 0 ] || exec "${pytest[@]}" "$@"
alone=(tests/parallel tests/gpu)
elsewhere=(tests/ray "${alone[@]}")
most=(-n 2 --dist loadfile --no-loadscope-reorder "${elsewhere[@]/#/--ignore=}")
failed=()

output=$(mktemp)
set -m # a process group of its own, which can be ended with all that Ray started
"${pytest[@]}" tests/ray >"$output" 2>&1 &
ray=$!
set +m
trap 'kill -- "-$ray" 2>/dev/null || true; cat "$output"; rm -f "$output"' EXIT
trap 'exit 130' INT
nice -n 10 "${pytest[@]}" "${most[@]}" || failed+=("most tiers")
wait "$ray" || failed+=(ray)
cat "$output"
: >"$output" # the trap shows only what nobody has seen

"${pytest[@]}" "${alone[@]}" || failed+=(alone)
[ ${#failed[@]} -eq 0 ] && echo "test: all parts passed" && exit
echo "test: failed: ${failed[*]}" >&2
exit 1
