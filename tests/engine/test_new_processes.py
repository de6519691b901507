"""New processes: who serves the architecture, and how ``vllm serve`` refuses.

If vLLM itself serves the architecture, this extension takes over only when asked.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models import random_model, save, small_config

CASES: dict[str, tuple[str, dict[str, object], str, str]] = {
    "not asked": ("upstream", {}, "LlamaForCausalLM", "UpstreamConfig"),
    "others' options": ("upstream", {"additional_config": {"other": 1}}, "LlamaForCausalLM", "UpstreamConfig"),
    "asked by options": (
        "upstream",
        {"additional_config": {"nld": {}}},
        "NLDForCausalLM",
        "NemotronLabsDiffusionConfig",
    ),
    "asked by drafts": (
        "upstream",
        {"speculative_config": {"model": "vllm_nld.SelfSpeculation"}},
        "NLDForCausalLM",
        "NemotronLabsDiffusionConfig",
    ),
    "needed": ("nothing", {}, "NLDForCausalLM", "NemotronLabsDiffusionConfig"),
}

# A vLLM that serves the architecture: its own config class and model class are registered before any plugin loads.
# Every case has a process of its own, which is forked after vLLM is imported, because that takes most of the time.
SCRIPT = """
import json, os, sys
import vllm.v1.engine.input_processor, vllm.v1.executor  # else each of the processes imports them
from transformers import AutoConfig, LlamaConfig
from vllm import EngineArgs, ModelRegistry

class UpstreamConfig(LlamaConfig):
    model_type = "nemotron_labs_diffusion"

def run(name, served, settings):
    AutoConfig.register("nemotron_labs_diffusion", UpstreamConfig)
    if served == "upstream":
        ModelRegistry.register_model("NemotronLabsDiffusionModel", "vllm.model_executor.models.llama:LlamaForCausalLM")
    args = EngineArgs(model=sys.argv[1], skip_tokenizer_init=True, max_model_len=128, **settings)
    config = args.create_engine_config().model_config
    model_class, _ = ModelRegistry.resolve_model_cls(config.hf_config.architectures, config)
    print("RESULT", json.dumps([name, model_class.__name__, type(config.hf_config).__name__]), flush=True)

for case in json.loads(sys.argv[2]):
    child = os.fork()
    if child == 0:
        run(*case)
        os._exit(0)
    os.waitpid(child, 0)

print("SERVE", file=sys.stderr, flush=True)
child = os.fork()
if child == 0:  # what the script ``vllm`` does
    from vllm.entrypoints.cli.main import main
    sys.argv = ["vllm", "serve", sys.argv[1], *json.loads(sys.argv[3])]
    sys.exit(main())
print("SERVE", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
UNSUITABLE = ["--max-model-len", "256", "--skip-tokenizer-init", "--additional-config", '{"nld": {"speed": "fast"}}']


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model(small_config()), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def ended(folder: Path) -> subprocess.CompletedProcess[str]:
    """Return what the processes wrote."""
    cases = json.dumps([[name, served, settings] for name, (served, settings, _, _) in CASES.items()])
    command = [sys.executable, "-c", SCRIPT, str(folder), cases, json.dumps(UNSUITABLE)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400)


@pytest.mark.parametrize("case", CASES)
def test_own_model_serves_only_if_needed_or_asked_for(case: str, ended: subprocess.CompletedProcess[str]) -> None:
    lines = [line for line in ended.stdout.splitlines() if line.startswith("RESULT ")]
    found = [json.loads(line.removeprefix("RESULT ")) for line in lines]
    assert {name: classes for name, *classes in found}.get(case) == list(CASES[case][2:]), ended.stderr[-3000:]


def test_vllm_serve_prints_one_line_and_fails_on_error(ended: subprocess.CompletedProcess[str]) -> None:
    (status,) = (line for line in ended.stdout.splitlines() if line.startswith("SERVE "))
    assert status != "SERVE 0"
    _, errors = ended.stderr.split("SERVE\n")
    # Some versions of vLLM put the process's name before every line.
    (line,) = (re.sub(r"^\(\w+ pid=\d+\) ", "", line) for line in errors.splitlines() if "speed" in line)
    assert line.startswith("vllm-nld: error: additional_config[\"nld\"].speed='fast' is unknown; allowed keys: mode, ")
    assert "Traceback" not in errors
