"""The dense vision tower and projector against transformers' modeling code, and images in the reference's prompts."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import models
from vllm_nld.checkpoints.headers import expected_tensors
from vllm_nld.reference import KVCache, ReferenceVLM, ar_generate, generate, linear_spec_generate, load_reference
from vllm_nld.vision.images import grid_of, tokens_of

pytestmark = pytest.mark.unit

CELL = 28


@cache
def model_of(seed: int = 0) -> ReferenceVLM:
    model = ReferenceVLM(models.small_vlm_config())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            random = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel()
            parameter.copy_(1 + 0.2 * random if parameter.ndim == 1 else 1.6 * fan_in**-0.5 * random)
    return model.eval()


def picture(columns: int, rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, rows * CELL, columns * CELL, generator=generator)


def prompt_with(*images: Tensor, text: tuple[int, ...] = (6, 7, 8)) -> list[int]:
    """Text, then each image and a token of text after it."""
    ids = model_of().config.image_token_ids
    prompt = [1, 2]
    for index, pixels in enumerate(images):
        prompt += [*tokens_of(grid_of(pixels.shape[2], pixels.shape[1], 1400, CELL), ids), 3 + index]
    return [*prompt, *text]


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (4, 3), (1, 5), (8, 2)])
def test_tower_and_projector_equal_those_of_transformers(columns: int, rows: int) -> None:
    model, pixels = model_of(), picture(columns, rows, seed=columns)
    with torch.no_grad():
        found = model.image_features(pixels[None])[0]
        wanted = their_features(model, pixels)
    assert found.shape == (columns * rows, model.config.hidden_size)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def their_features(model: ReferenceVLM, pixels: Tensor) -> Tensor:
    pixtral = pytest.importorskip("transformers.models.pixtral.modeling_pixtral", exc_type=ImportError)
    mistral3 = pytest.importorskip("transformers.models.mistral3.modeling_mistral3", exc_type=ImportError)
    from transformers import Mistral3Config

    config = model.config
    text = {"model_type": "mistral", "hidden_size": config.hidden_size, "rms_norm_eps": config.rms_norm_eps}
    whole = Mistral3Config(vision_config=config.vision_config, text_config=text, vision_feature_layer=-1)
    parts: list[tuple[Any, str]] = [
        (pixtral.PixtralVisionModel(config.vision_config), "encoder.vision_tower."),
        (mistral3.Mistral3MultiModalProjector(whole), "encoder.multi_modal_projector."),
    ]
    for part, prefix in parts:
        state = {name.removeprefix(prefix): x for name, x in model.state_dict().items() if name.startswith(prefix)}
        part.load_state_dict(state)
        part.eval()
    (tower, _), (projector, _) = parts
    size = torch.tensor([pixels.shape[1:]])
    seen = tower(pixels[None], image_sizes=size).last_hidden_state[0]
    return torch.as_tensor(projector(seen, size))


def test_images_of_one_size_do_not_see_each_other() -> None:
    model, images = model_of(), torch.stack([picture(2, 3, seed) for seed in range(3)])
    with torch.no_grad():
        together = model.image_features(images)
        apart = torch.cat([model.image_features(pixels[None]) for pixels in images])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


def test_parameters_have_the_released_names_and_shapes(tmp_path: Path) -> None:
    config = models.small_vlm_config()
    model = ReferenceVLM(config)
    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == expected_tensors(config)
    loaded = load_reference(models.save_vlm(config, tmp_path, seed=3))
    assert isinstance(loaded, ReferenceVLM)
    assert loaded.config.to_dict() == config.to_dict() | {"transformers_version": loaded.config.transformers_version}


def test_tied_embeddings_are_one_parameter() -> None:
    model = ReferenceVLM(models.small_vlm_config(tie_word_embeddings=True))
    assert model.diffusion_head.weight is model.encoder.embed_tokens.weight
    assert "diffusion_head.weight" not in dict(model.named_parameters())


def test_a_missing_tensor_of_the_tower_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = models.save_vlm(models.small_vlm_config(), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.vision_tower.ln_pre.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing encoder\.vision_tower\.ln_pre\.weight"):
        load_reference(folder)


def test_embeddings_stand_at_the_pads_in_order() -> None:
    model, images = model_of(), (picture(2, 1, 0), picture(1, 2, 1))
    ids = torch.tensor([prompt_with(*images)])
    with torch.no_grad():
        embedded = model.embed(ids, images)[0]
        features = torch.cat([model.image_features(pixels[None])[0] for pixels in images])
        words = model.encoder.embed_tokens(ids)[0]
    pads = ids[0] == model.config.image_pad_token_id
    assert torch.equal(embedded[pads], features)
    assert torch.equal(embedded[~pads], words[~pads])


def test_pads_and_cells_must_be_as_many() -> None:
    model = model_of()
    with pytest.raises(ValueError, match="the prompt has 2 image pads, but its images have 4 cells"):
        ar_generate(model, prompt_with(picture(2, 1)), 4, images=[picture(2, 2)])


def test_a_text_model_refuses_images() -> None:
    text = models.random_model(models.small_config(), 0)
    with pytest.raises(ValueError, match="1 images, but nemotron_labs_diffusion is a text model"):
        ar_generate(text, prompt_with(picture(1, 1)), 4, images=[picture(1, 1)])


@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("sizes", [((4, 3),), ((1, 1), (3, 2)), ()])
def test_self_speculation_equals_ar_with_images(sizes: tuple[tuple[int, int], ...], threshold: float) -> None:
    model, accepted = model_of(), 0
    for seed in range(3):
        images = [picture(*size, seed=seed + index) for index, size in enumerate(sizes)]
        prompt = prompt_with(*images)
        wanted = ar_generate(model, prompt, 24, images=images)
        found = linear_spec_generate(model, prompt, 24, 8, threshold=threshold, images=images)
        assert found.ids == wanted.ids
        assert len(found.ids) == len(prompt) + 24
        accepted += sum(count - 1 for count in found.accepted)
    assert accepted > 0, "no draft was ever accepted: the comparison exercised nothing"


def test_pictures_change_all_methods() -> None:
    model = model_of()
    one, other = picture(3, 2, seed=0), picture(3, 2, seed=1)
    prompt = prompt_with(one)
    for method in (ar_generate, linear_spec_generate, generate):
        assert method(model, prompt, 16, images=[one]).ids != method(model, prompt, 16, images=[other]).ids


def test_an_image_is_prefilled_causally() -> None:
    """What is after an image, or in its later rows, does not change what is before."""
    model, images = model_of(), [picture(2, 2), picture(2, 2, seed=1)]
    ids = torch.tensor([prompt_with(*images)])
    first_end = prompt_with(*images).index(model.config.image_end_token_id) + 1
    logits = []
    with torch.no_grad():
        for second in (images[1], picture(2, 2, seed=2)):
            cache = KVCache()
            logits.append(model.causal(ids, cache, model.embed(ids, [images[0], second])))
            assert cache.length == ids.shape[1]
    torch.testing.assert_close(logits[0][:, :first_end], logits[1][:, :first_end], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits[0][:, -1], logits[1][:, -1], atol=1e-2)


def test_gradients_reach_the_tower() -> None:
    model = ReferenceVLM(models.small_vlm_config())
    ids = torch.tensor([prompt_with(picture(2, 1))])
    model.causal(ids, None, model.embed(ids, [picture(2, 1)]))[0, -1, 6].backward()
    patches = model.encoder.vision_tower.patch_conv.weight
    assert patches.grad is not None
    assert patches.grad.abs().max() > 0
