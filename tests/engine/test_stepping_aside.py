"""If vLLM itself serves the architecture, this extension takes over only when asked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models import random_model, save, small_config

# A vLLM that serves the architecture: its own config class and model class are registered before any plugin loads.
SCRIPT = """
import json, sys
from transformers import AutoConfig, LlamaConfig
from vllm import EngineArgs, ModelRegistry

class UpstreamConfig(LlamaConfig):
    model_type = "nemotron_labs_diffusion"

AutoConfig.register("nemotron_labs_diffusion", UpstreamConfig)
if sys.argv[1] == "upstream":
    ModelRegistry.register_model("NemotronLabsDiffusionModel", "vllm.model_executor.models.llama:LlamaForCausalLM")
settings = json.loads(sys.argv[3])
config = EngineArgs(model=sys.argv[2], skip_tokenizer_init=True, max_model_len=128, **settings).create_engine_config()
model_class, _ = ModelRegistry.resolve_model_cls(config.model_config.hf_config.architectures, config.model_config)
print("RESULT", json.dumps([model_class.__name__, type(config.model_config.hf_config).__name__]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model(small_config()), tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("vllm_serves", "settings", "model", "config"),
    [
        ("upstream", {}, "LlamaForCausalLM", "UpstreamConfig"),
        ("upstream", {"additional_config": {"other": 1}}, "LlamaForCausalLM", "UpstreamConfig"),
        ("upstream", {"additional_config": {"nld": {}}}, "NLDForCausalLM", "NemotronLabsDiffusionConfig"),
        (
            "upstream",
            {"speculative_config": {"model": "vllm_nld.SelfSpeculation"}},
            "NLDForCausalLM",
            "NemotronLabsDiffusionConfig",
        ),
        ("nothing", {}, "NLDForCausalLM", "NemotronLabsDiffusionConfig"),
    ],
)
def test_own_model_serves_only_if_needed_or_asked_for(
    folder: Path, vllm_serves: str, settings: dict[str, object], model: str, config: str
) -> None:
    command = [sys.executable, "-c", SCRIPT, vllm_serves, str(folder), json.dumps(settings)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, result.stderr[-3000:]
    assert json.loads(lines[0].removeprefix("RESULT ")) == [model, config]
