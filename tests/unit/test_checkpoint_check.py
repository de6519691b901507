"""Tensor names and shapes compared with the config, from file headers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import models
from vllm_nld.checkpoints.headers import check_tensors, expected_tensors
from vllm_nld.errors import NLDError
from vllm_nld.reference import load_reference

CONFIG = models.small_config()
QUERY = "encoder.layers.1.self_attn.q_proj.weight"
HEAD = "diffusion_head.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return models.save(models.random_model(CONFIG), tmp_path / "model")


def test_expected_tensors_equal_those_of_the_model() -> None:
    model = models.random_model(CONFIG)
    assert expected_tensors(CONFIG) == {name: tuple(value.shape) for name, value in model.named_parameters()}


def test_good_folder_passes(folder: Path) -> None:
    check_tensors(folder, CONFIG)
    load_reference(folder)


def test_shards_and_folders_without_weights_pass(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({HEAD: tensors.pop(HEAD)}, folder / "model-2.safetensors")
    save_file(tensors, folder / "model.safetensors")
    check_tensors(folder, CONFIG)
    check_tensors(tmp_path, CONFIG)


def test_missing_and_misshapen_are_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors[HEAD]
    tensors[QUERY] = tensors[QUERY][:100].contiguous()
    save_file(tensors, file)
    with pytest.raises(NLDError) as caught:
        check_tensors(folder, CONFIG)
    message = str(caught.value)
    assert str(folder) in message
    assert f"{HEAD} is missing" in message
    assert f"{QUERY} has shape [100, 64], config.json asks for [128, 64]" in message
    assert message.count("encoder.") == 1
    with pytest.raises(ValueError) as refused:
        load_reference(folder)
    assert f"missing {HEAD}" in str(refused.value)
    assert f"{QUERY} is [100, 64], not [128, 64]" in str(refused.value)


def test_long_lists_are_cut(folder: Path) -> None:
    with pytest.raises(NLDError, match=r"is missing.*\(and 4 more\)"):
        check_tensors(folder, models.small_config(num_hidden_layers=3))


def test_tied_embeddings_are_one_tensor(tmp_path: Path) -> None:
    config = models.small_config(tie_word_embeddings=True)
    model = models.random_model(config)
    folder = models.save(model, tmp_path)
    found = load_file(folder / "model.safetensors")
    assert set(found) == set(expected_tensors(config)) == {name for name, _ in model.named_parameters()}
    check_tensors(folder, config)
    loaded = load_reference(folder, torch.bfloat16)
    assert loaded.diffusion_head.weight is loaded.encoder.embed_tokens.weight
    ids = torch.tensor([[1, 7, 3]])
    torch.testing.assert_close(load_reference(folder).causal(ids), model.causal(ids), rtol=0, atol=0)


def test_a_head_beside_tied_embeddings_is_refused(folder: Path) -> None:
    """vLLM would load it over the embedding."""
    with pytest.raises(NLDError, match=f"{HEAD} is there, but tie_word_embeddings=true"):
        check_tensors(folder, models.small_config(tie_word_embeddings=True))
    models.small_config(tie_word_embeddings=True).save_pretrained(folder)
    with pytest.raises(ValueError, match=f"unexpected {HEAD}"):
        load_reference(folder)
