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
from vllm_nld.checkpoints.draft_lora import FOLDER, MASK_ROW, TARGETS, DraftLoRA, adapter_of, in_order, tensor_names
from vllm_nld.checkpoints.headers import tensor_shapes
from vllm_nld.errors import NLDError
from vllm_nld.reference import DraftAdapter

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


@pytest.mark.parametrize("targets", [("v_proj", "q_proj"), ("up_proj",), ("down_proj", "o_proj"), TARGETS])
@pytest.mark.parametrize("mask_row", [False, True])
def test_any_projections_and_the_mask_token_s_row(tmp_path: Path, targets: tuple[str, ...], mask_row: bool) -> None:
    made = random_adapter(CONFIG, targets=targets, mask_row=mask_row)
    made.write(tmp_path, "somewhere")
    found = DraftLoRA.open(tmp_path, CONFIG)
    assert found == DraftLoRA(tmp_path, 4, 2.0, in_order(targets), mask_row)
    read = DraftAdapter.read(tmp_path)
    assert (list(read.a), list(read.b)) == (list(made.a), list(made.b))
    assert (read.targets, read.scale, read.mask_token_id) == (in_order(targets), 2.0, 5 if mask_row else None)
    assert all(map(torch.equal, read.parameters, made.parameters))
    names = tensor_shapes(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.encoder"
    assert len(names) == 4 * len(targets) + mask_row
    for target in targets:
        part = "self_attn" if target[0] in "qkvo" else "mlp"
        assert f"{prefix}.layers.1.{part}.{target}.lora_B.weight" in names
    assert mask_row == (f"{prefix}.embed_tokens.token_adapter.trainable_tokens_delta" in names)


@pytest.mark.parametrize("tokens", [[5], {"embed_tokens": [5]}])
def test_both_spellings_of_the_mask_token_s_row(tmp_path: Path, tokens: Any) -> None:
    made = random_adapter(CONFIG, mask_row=True)
    made.write(tmp_path, "somewhere")
    change_settings(tmp_path, trainable_token_indices=tokens)
    assert DraftLoRA.open(tmp_path, CONFIG).mask_row
    assert DraftAdapter.read(tmp_path).mask_token_id == 5


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
        ({"target_modules": ["o_proj", "q_proj"]}, ["0.self_attn.q_proj.lora_A.weight is missing"]),
        ({"target_modules": ["o_proj", "lm_head"]}, ["target_modules=['o_proj', 'lm_head']", "q_proj", "down_proj"]),
        ({"target_modules": "all-linear"}, ["target_modules='all-linear'", "one or more of"]),
        ({"target_modules": []}, ["target_modules=[]"]),
        ({"target_modules": None}, ["target_modules=None"]),
        ({"trainable_token_indices": [5]}, ["token_adapter.trainable_tokens_delta is missing"]),
        ({"trainable_token_indices": [4, 5]}, ["trainable_token_indices=[4, 5]", "{'embed_tokens': [5]}"]),
        ({"trainable_token_indices": {"lm_head": [5]}}, ["trainable_token_indices={'lm_head': [5]}"]),
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
        ({tensor_names(1, "o_proj")[1]: None}, [tensor_names(1, "o_proj")[1], "is missing"]),
        ({tensor_names(0, "o_proj")[0]: torch.zeros(4, 64)}, ["[4, 64]", "[4, 128]"]),
        ({tensor_names(0, "o_proj")[1]: torch.zeros(96, 4)}, ["[96, 4]", "[64, 4]"]),
        ({tensor_names(2, "o_proj")[0]: torch.zeros(4, 128)}, [tensor_names(2, "o_proj")[0], "belongs to no o_proj"]),
        ({tensor_names(0, "up_proj")[0]: torch.zeros(4, 64)}, ["mlp.up_proj.lora_A.weight belongs to no o_proj"]),
        ({MASK_ROW: torch.zeros(1, 64)}, [MASK_ROW, "belongs to no o_proj"]),
    ],
)
def test_unsuitable_tensors_are_refused_by_name(folder: Path, changes: dict[str, Any], words: list[str]) -> None:
    change_tensors(folder, **changes)
    with pytest.raises(NLDError) as caught:
        DraftLoRA.open(folder, CONFIG)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({tensor_names(1, "k_proj")[1]: torch.zeros(128, 4)}, ["k_proj.lora_B.weight has shape [128, 4]", "[64, 4]"]),
        ({tensor_names(1, "down_proj")[0]: torch.zeros(4, 64)}, ["down_proj.lora_A.weight", "[4, 96]"]),
        ({MASK_ROW: torch.zeros(64)}, [MASK_ROW, "[64]", "[1, 64]"]),
    ],
)
def test_unsuitable_tensors_of_other_projections(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    random_adapter(CONFIG, targets=TARGETS, mask_row=True).write(tmp_path, "somewhere")
    change_tensors(tmp_path, **changes)
    with pytest.raises(NLDError) as caught:
        DraftLoRA.open(tmp_path, CONFIG)
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
    for content, words in (("{", "not JSON"), ("[]", "no JSON object")):
        (folder / "adapter_config.json").write_text(content)
        with pytest.raises(NLDError, match=words):
            DraftLoRA.open(folder, CONFIG)
