#!/usr/bin/env bash
# Build the documentation site in build/site; open build/site/index.html. A broken link, a missing picture, or a page that
# docs/index.md does not list is an error. Other addresses are not asked.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VLLM_NLD_VENV:-.venv}
[ -x "$venv/bin/sphinx-build" ] || scripts/setup.sh --no-demo
"$venv/bin/python" -m sphinx --fresh-env --fail-on-warning --keep-going --quiet -c docs -d build/doctrees . build/site
echo "docs: build/site/index.html"
