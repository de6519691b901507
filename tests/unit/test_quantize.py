"""``vllm-nld quantize``, with compressed-tensors in place of llm-compressor, which no environment with vLLM has.

All ten schemes were run once by llm-compressor itself (``docs/user/quantization.md``).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.commands import invoke
from tests.support.models import random_model, save, save_vlm, small_config, small_vlm_config
from tests.support.quantized import compress
from vllm_nld.checkpoints import EMBEDDED
from vllm_nld.checkpoints.quantize import IGNORED, SCHEMES, quantize
from vllm_nld.cli.dummy import dummy_config
from vllm_nld.errors import NLDError

CONFIG = small_config()
PYTHON = Path(sys.executable)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = save(random_model(CONFIG), tmp_path / "source")
    for part in ("linear_spec_lora", "learned_sampler"):
        (folder / part).mkdir()
        save_file({"weight": torch.ones(3, 3)}, folder / part / "model.safetensors")
    (folder / ".cache").mkdir()
    return folder


class Compressor:
    """Runs the command in this process: what is asked for, and with a fault if wished."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.asked: dict[str, Any] = {}

    def __call__(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        if len(command) == 3:  # whether it is there
            return subprocess.CompletedProcess(command, int(self.fault == "absent"))
        self.asked = json.loads(command[3])
        if self.fault == "fails":
            return subprocess.CompletedProcess(command, 1, "", "Traceback ...\nValueError: no such scheme\n")
        model = Path(self.asked["model_stub"])
        assert not [part for part in model.iterdir() if part.is_dir()], "it fails over folders with tensors"
        target = Path(self.asked["save_directory"])
        compress(model, target, self.asked["scheme"], self.asked["ignore"])
        if self.fault:
            self.damage(target / "model.safetensors")
        return subprocess.CompletedProcess(command, 0)

    def damage(self, file: Path) -> None:
        tensors = load_file(file)
        if self.fault == "head":
            tensors["diffusion_head.weight"] += 1
        if self.fault == "scale":
            tensors["encoder.layers.1.mlp.up_proj.weight_scale"] *= 2
        if self.fault == "not a number":
            tensors["encoder.layers.1.mlp.up_proj.weight_scale"].fill_(torch.nan)
        if self.fault == "missing":
            del tensors["encoder.layers.1.mlp.up_proj.weight"]
            del tensors["encoder.layers.1.mlp.up_proj.weight_scale"]
        save_file(tensors, file)


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16", "W4A8", "FP8_DYNAMIC"])
def test_copy_is_quantized_and_the_rest_carried_over(source: Path, tmp_path: Path, scheme: str) -> None:
    run = Compressor()
    result = quantize(source, tmp_path / "made" / "packed", scheme, PYTHON, "cpu", run)
    folder = tmp_path / "made" / "packed"
    assert run.asked["ignore"] == ["diffusion_head", "encoder.embed_tokens"]
    assert run.asked["device"] == "cpu"
    assert result.carried == ["learned_sampler", "linear_spec_lora"]
    assert result.matrices == 7 * CONFIG.num_hidden_layers
    assert 0 < result.error < 0.2
    assert "quantization_config" in json.loads((folder / "config.json").read_text())
    for part in result.carried:
        assert torch.equal(load_file(folder / part / "model.safetensors")["weight"], torch.ones(3, 3))
    assert [part.name for part in (tmp_path / "made").iterdir()] == ["packed"], "nothing is left behind"
    with pytest.raises(NLDError, match="quantized already"):
        quantize(folder, tmp_path / "again", scheme, PYTHON, "cpu", run)


def test_image_part_stays_as_it_is(tmp_path: Path) -> None:
    source = save_vlm(small_vlm_config(), tmp_path / "source")
    run = Compressor()
    quantize(source, tmp_path / "packed", "W8A8", PYTHON, "cpu", run)
    assert "encoder.multi_modal_projector.linear_1" in run.asked["ignore"]
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "packed"))
    image_part = [name for name in before if "vision_tower" in name or "multi_modal_projector" in name]
    assert image_part
    assert all(torch.equal(before[name], after[name]) for name in image_part)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("absent", ["--python", "no llm-compressor", "pip install llmcompressor"]),
        ("fails", ["--scheme W8A8", "llm-compressor failed: ValueError: no such scheme"]),
        ("head", ["diffusion_head.weight", "was changed"]),
        ("scale", ["encoder.layers.1.mlp.up_proj.weight", "differs by 100%"]),
        ("not a number", ["encoder.layers.1.mlp.up_proj.weight", "differs by nan%"]),
        ("missing", ["encoder.layers.1.mlp.up_proj.weight is missing"]),
    ],
)
def test_what_is_wrong_is_named_and_nothing_written(source: Path, tmp_path: Path, fault: str, words: list[str]) -> None:
    with pytest.raises(NLDError) as caught:
        quantize(source, tmp_path / "packed", "W8A8", PYTHON, "cpu", Compressor(fault))
    for word in words:
        assert word in str(caught.value)
    assert [part.name for part in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tiny", "OUT", "--scheme", "W3A3"], ["--scheme 'W3A3'", *SCHEMES]),
        (["tiny", ".", "--scheme", "W8A8"], ["FOLDER=.", "does not exist yet"]),
        ([".", "OUT", "--scheme", "W8A8"], ["SOURCE=.", "no checkpoint of this model"]),
        (["tiny", "OUT", "--scheme", "W8A8", "--python", "/nowhere/python"], ["--python /nowhere/python"]),
        (["tiny", "OUT", "--scheme", "W8A8"], ["has no llm-compressor"]),
    ],
)
def test_arguments_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert EMBEDDED["tiny"].is_dir()
    result = invoke("quantize", *arguments)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dummy_weights_have_the_config_of_a_quantized_checkpoint(scheme: str) -> None:
    found = dummy_config("3b", 1, scheme).to_dict()["quantization_config"]
    assert list(found["config_groups"]) == [scheme]
    assert found["config_groups"][scheme]["format"] == found["format"] != "dense"
    assert found["ignore"] == IGNORED
