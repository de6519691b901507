"""The training of the tiny VLM: pictures, prompts, and the loss, which sees what a draft pass sees."""

from __future__ import annotations

import random

import muon
import pytest
import torch
from corpus import EOS_ID
from train_vision import NAMES, Gallery, answered, captioned_right
from vision_checkpoint import prompt_ids, tiny_vlm_config, train_tokenizer
from vision_objective import dual_stream, joint_loss
from vision_scenes import LONG, SHORT, SIZES, Scene, combinations, draw_scene, is_held_out, render

from vllm_nld.reference import KVCache, ReferenceVLM

pytestmark = pytest.mark.unit

TOKENIZER = train_tokenizer()


def fresh_model(seed: int = 0) -> ReferenceVLM:
    torch.manual_seed(seed)
    model = ReferenceVLM(tiny_vlm_config(TOKENIZER.get_vocab_size()))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    return model.eval()


def test_captions_say_what_a_scene_shows() -> None:
    scene = Scene("red", "circle", 7, (1, 3, 0))
    assert scene.short() == "two red circles and 7"
    assert scene.long() == (
        "There is the digit 7 at the top left, a red circle at the top right, nothing at the bottom left and a red "
        "circle at the bottom right."
    )
    assert Scene("blue", "star", 0, (2, 3)).short() == "one blue star and 0"


def test_one_digit_of_each_count_color_and_shape_is_held_out() -> None:
    held_out, trained = combinations(held_out=True), combinations(held_out=False)
    assert len({combination[:3] for combination in held_out}) == len(held_out) == 48
    assert len(trained) == 432
    assert not {*held_out} & {*trained}
    assert {combination[3] for combination in held_out} == {*range(10)}


def test_no_picture_of_training_is_held_out() -> None:
    colors, shapes = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle", "star")
    rng = random.Random(0)
    for held_out in (True, False):
        for scene in (draw_scene(rng, held_out) for _ in range(300)):
            where = scene.count, colors.index(scene.color), shapes.index(scene.shape), scene.digit
            assert is_held_out(*where) == held_out


@pytest.mark.parametrize("size", SIZES)
def test_shapes_are_in_their_corners(size: tuple[int, int]) -> None:
    picture = render(Scene("blue", "square", 1, (1, 2)), size, random.Random(0))
    assert picture.size == size
    pixels = torch.tensor([*picture.getdata()]).view(size[1], size[0], 3)
    blue = pixels[..., 2] - pixels[..., 0] > 100
    rows, columns = blue.nonzero().unbind(1)
    assert len(rows) > 40
    assert int(rows.max()) < size[1] / 2
    assert int(columns.min()) >= size[0] / 2


def test_every_word_of_a_caption_is_one_token() -> None:
    tokens = TOKENIZER.encode("three yellow triangles and 9", add_special_tokens=False).tokens
    assert tokens == ["three", "Ġyellow", "Ġtriangles", "Ġand", "Ġ9"]


def test_a_prompt_holds_a_pad_for_each_cell() -> None:
    prompt = prompt_ids(TOKENIZER, SHORT, 84, 56)
    image = [18, 19, 19, 19, 20, 19, 19, 19, 21]
    begin = prompt.index(18)
    assert prompt[begin : begin + len(image)] == image
    assert TOKENIZER.decode(prompt[:begin], skip_special_tokens=False) == "<|im_start|>user\n"
    after = TOKENIZER.decode(prompt[begin + len(image) :], skip_special_tokens=False)
    assert after == f"{SHORT}<|im_end|>\n<|im_start|>assistant\n<think></think>"


@pytest.mark.parametrize("shift", [0, 5])
def test_a_noisy_block_is_a_draft_after_the_clean_text(shift: int) -> None:
    """The last block of the dual stream equals a draft pass over a cache of all before it, the picture included."""
    model, scene = fresh_model(), draw_scene(random.Random(1), held_out=False)
    pixels = torch.randn(1, 3, 56, 84, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        batch = answered(LONG, (84, 56), [scene], model.image_features(pixels), TOKENIZER, 3)
        first = batch.start + shift
        length, block_length = batch.ids.shape[1], model.config.block_size
        begin = first + (length - 1 - first) // block_length * block_length
        masked = torch.ones(1, length - batch.start, dtype=torch.bool)
        masked[0, begin - batch.start] = False
        noisy, clean = dual_stream(model, batch, masked, first)
        cache = KVCache()
        prefix = batch.ids[:, :begin]
        causal = model.causal(prefix, cache, model.embed(prefix, [pixels[0]]))
        block = batch.ids[:, begin:].clone()
        block[:, 1:] = model.config.mask_token_id
        drafts = model.draft(block, cache)
    assert begin > batch.start
    torch.testing.assert_close(model.logits(noisy[:, begin - batch.start :]), drafts, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.logits(clean[:, :begin]), causal, atol=1e-4, rtol=1e-4)


def test_all_parts_learn_from_both_losses() -> None:
    model = fresh_model()
    scenes = [draw_scene(random.Random(seed), held_out=False) for seed in range(4)]
    pixels = torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    for part in range(2):
        model.zero_grad()
        batch = answered(SHORT, (56, 56), scenes, model.image_features(pixels), TOKENIZER, 12)
        joint_loss(model, batch, torch.Generator().manual_seed(0))[part].backward()
        still = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().max() > 0]  # type: ignore[union-attr]
        assert not still


def test_end_tokens_after_an_answer_have_ended() -> None:
    model = fresh_model()
    scenes = [Scene("red", "star", 1, (0, 1)), Scene("red", "star", 1, (0, 1, 2))]
    features = torch.zeros(2, 4, model.config.hidden_size)
    batch = answered(LONG, (56, 56), scenes, features, TOKENIZER, 2)
    answer = len(TOKENIZER.encode(scenes[0].long(), add_special_tokens=False).ids)
    assert int((~batch.ended[0]).sum()) == batch.start + answer + 1
    assert batch.ids[0, batch.start + answer] == EOS_ID
    assert batch.ended[0].sum() > batch.ended[1].sum() == 2


def test_a_model_that_knows_nothing_captions_nothing_right() -> None:
    gallery = Gallery(20, seed=0, held_out=True)
    assert captioned_right(fresh_model(), gallery, TOKENIZER) == {f"{name}_right": 0.0 for name in NAMES}


def test_muon_makes_all_singular_values_alike() -> None:
    matrix = torch.randn(12, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 12)[:, None]
    for update in (matrix, matrix.T):
        values = torch.linalg.svdvals(muon.orthogonalized(update))
        assert 0.6 < float(values.min()) <= float(values.max()) < 1.3
