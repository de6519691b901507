#!/usr/bin/env bash
# ruff (lint and format), mypy --strict on the package, clang-format on C++,
# on scripts shellcheck, on container recipes hadolint.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${VLLM_NLD_VENV:-.venv}/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
find csrc \( -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' \) -print0 | xargs -0 --no-run-if-empty "$bin/clang-format" --dry-run --Werror
"$bin/shellcheck" scripts/*.sh docker/*.sh .ci/run
"$bin/hadolint" docker/*.Dockerfile
