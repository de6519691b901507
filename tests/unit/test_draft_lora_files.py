"""Adapters on disk: which are found, and which are refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.adapters import change_settings, change_tensors, random_adapter
from tests.support.models import small_config
from vllm_nld.checkpoints import draft_lora
from vllm_nld.checkpoints.draft_lora import FOLDER, DraftLoRA, adapter_of, tensor_names
from vllm_nld.errors import NLDError

CONFIG = small_config()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_adapter(CONFIG).write(tmp_path / FOLDER, "somewhere")
    return tmp_path / FOLDER


def engine_config(model: str, **options: Any) -> Any:
    """The part of vLLM's config that ``adapter_of`` reads."""
    return SimpleNamespace(
        speculative_config=SimpleNamespace(model="vllm_nld.SelfSpeculation"),
        additional_config={"nld": options},
        model_config=SimpleNamespace(model=model, revision="main", hf_config=CONFIG),
        load_config=SimpleNamespace(download_dir=None),
    )


def test_rank_and_scale_are_read(folder: Path) -> None:
    assert DraftLoRA.open(folder, CONFIG) == DraftLoRA(folder, rank=4, scale=2.0)


def test_adapter_of_the_checkpoint_is_the_default(folder: Path, tmp_path: Path) -> None:
    checkpoint = str(folder.parent)
    assert adapter_of(engine_config(checkpoint)) == DraftLoRA(folder, 4, 2.0)
    assert adapter_of(engine_config(checkpoint, draft_lora="off")) is None
    assert adapter_of(engine_config(str(tmp_path / "elsewhere"), draft_lora=str(folder))) == DraftLoRA(folder, 4, 2.0)
    (tmp_path / "bare").mkdir()
    assert adapter_of(engine_config(str(tmp_path / "bare"))) is None
    config = engine_config(checkpoint)
    config.speculative_config = None
    assert adapter_of(config) is None, "an engine that never drafts needs no adapter"


def test_adapter_of_a_hub_checkpoint_is_fetched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own download does not fetch subfolders."""
    import huggingface_hub

    asked: list[Any] = []

    def download(model: str, **options: Any) -> str:
        asked.append((model, options["revision"], options["allow_patterns"]))
        return str(folder.parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    draft_lora.checkpoint_folder.cache_clear()
    assert adapter_of(engine_config("nvidia/some-model")) == DraftLoRA(folder, 4, 2.0)
    assert asked == [("nvidia/some-model", "main", [f"{FOLDER}/*", "config.json"])]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_rslora": True}, ["use_rslora=True", "False"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save=['lm_head']", "None"]),
        ({"use_dora": True}, ["use_dora=True"]),
        ({"bias": "all"}, ["bias='all'", "'none'"]),
        ({"rank_pattern": {"0": 2}}, ["rank_pattern"]),
        ({"target_modules": ["o_proj", "q_proj"]}, ["target_modules", "q_proj", "['o_proj']"]),
        ({"target_modules": None}, ["target_modules=None"]),
        ({"r": 0}, ["r=0", "positive"]),
        ({"r": 8}, ["lora_A.weight has shape [4, 128]", "r=8", "[8, 128]"]),
        ({"lora_alpha": "much"}, ["lora_alpha='much'", "number"]),
    ],
)
def test_unsuitable_settings_are_refused_by_name(folder: Path, changes: dict[str, Any], words: list[str]) -> None:
    change_settings(folder, **changes)
    with pytest.raises(NLDError) as caught:
        DraftLoRA.open(folder, CONFIG)
    for word in ["draft_lora", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({tensor_names(1)[1]: None}, [tensor_names(1)[1], "is missing"]),
        ({tensor_names(0)[0]: torch.zeros(4, 64)}, ["[4, 64]", "[4, 128]"]),
        ({tensor_names(0)[1]: torch.zeros(96, 4)}, ["[96, 4]", "[64, 4]"]),
        ({tensor_names(2)[0]: torch.zeros(4, 128)}, [tensor_names(2)[0], "belongs to no o_proj"]),
    ],
)
def test_unsuitable_tensors_are_refused_by_name(folder: Path, changes: dict[str, Any], words: list[str]) -> None:
    change_tensors(folder, **changes)
    with pytest.raises(NLDError) as caught:
        DraftLoRA.open(folder, CONFIG)
    for word in words:
        assert word in str(caught.value)


def test_missing_files_and_folders_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NLDError, match=r"draft_lora='/no/where'.*'auto', 'off'"):
        adapter_of(engine_config(str(tmp_path), draft_lora="/no/where"))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(NLDError, match=r"has no adapter_model.safetensors"):
        DraftLoRA.open(folder, CONFIG)
    (folder / "adapter_model.safetensors").touch()
    with pytest.raises(NLDError, match="cannot be read"):
        DraftLoRA.open(folder, CONFIG)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(NLDError, match="not JSON"):
        DraftLoRA.open(folder, CONFIG)
