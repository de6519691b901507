"""The embedded vision-language model: its files, and captions of held-out pictures by the dense reference."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer
from vision_checkpoint import prompt_ids, tiny_vlm_config, train_tokenizer
from vision_scenes import LONG, QUESTIONS, SHORT, Scene, draw_scene, render

from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.config import NemotronLabsDiffusionVLMConfig
from vllm_nld.reference import ReferenceVLM, ar_generate, generate, linear_spec_generate, load_reference
from vllm_nld.vision.images import MAX_IMAGE_SIZE, grid_of, pixels_of, tokens_of

FOLDER = checkpoint_path("tiny_vlm")
TOKENIZER = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
PICTURES = 10
MOST_TOKENS = 64


@cache
def trained() -> ReferenceVLM:
    model = load_reference(FOLDER)
    assert isinstance(model, ReferenceVLM)
    return model


def held_out(size: tuple[int, int], count: int = PICTURES) -> list[tuple[Scene, Tensor]]:
    rng = random.Random(f"held out {size}")
    scenes = [draw_scene(rng, held_out=True) for _ in range(count)]
    return [
        (scene, torch.from_numpy(pixels_of(render(scene, size, rng), MAX_IMAGE_SIZE, trained().config.image_cell)))
        for scene in scenes
    ]


def answer(scene: Scene, question: str) -> list[int]:
    return [*TOKENIZER.encode(scene.answer(question), add_special_tokens=False).ids, trained().config.eos_token_id]


@pytest.mark.parametrize("question", QUESTIONS)
def test_held_out_pictures_are_captioned_right(question: str) -> None:
    """In AR; self-speculation writes the same, in fewer forwards."""
    size = (56, 56)
    prompt = prompt_ids(TOKENIZER, question, *size)
    right, tokens, forwards = 0, 0, 0
    for scene, pixels in held_out(size):
        ar = ar_generate(trained(), prompt, MOST_TOKENS, images=[pixels])
        drafted = linear_spec_generate(trained(), prompt, MOST_TOKENS, images=[pixels])
        assert drafted.ids == ar.ids
        right += ar.ids[len(prompt) :] == answer(scene, question)
        tokens += len(ar.ids) - len(prompt)
        forwards += drafted.nfe - 1
    assert right >= 0.9 * PICTURES
    assert tokens > LEAST_TPF[question] * forwards


LEAST_TPF = {SHORT: 1.5, LONG: 2.5}


def test_block_diffusion_captions_held_out_pictures() -> None:
    size = (84, 56)
    prompt = prompt_ids(TOKENIZER, SHORT, *size)
    texts = [generate(trained(), prompt, MOST_TOKENS, threshold=0.9, images=[pixels]) for _, pixels in held_out(size)]
    right = [
        text.ids[len(prompt) :] == answer(scene, SHORT) for text, (scene, _) in zip(texts, held_out(size), strict=True)
    ]
    assert sum(right) >= 0.8 * PICTURES


def test_files_are_as_training_writes_them() -> None:
    config = NemotronLabsDiffusionVLMConfig.from_pretrained(FOLDER)
    wanted = tiny_vlm_config(train_tokenizer().get_vocab_size())
    assert config.to_diff_dict() == wanted.to_diff_dict() | {"transformers_version": config.transformers_version}
    assert TOKENIZER.to_str() == train_tokenizer().to_str()


def test_files_are_small() -> None:
    assert sum(file.stat().st_size for file in Path(FOLDER).rglob("*")) < 8e6


@pytest.mark.parametrize("kind", ["image", "image_url"])
def test_the_chat_template_writes_the_prompts_of_training(kind: str) -> None:
    """An image is one token in the template's text; the processor expands it."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    message = {"role": "user", "content": [{"type": kind}, {"type": "text", "text": SHORT}]}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    start, *_ = image_ids = trained().config.image_token_ids
    where = ids.index(start)
    ids[where : where + 1] = tokens_of(grid_of(84, 56, MAX_IMAGE_SIZE, 28), image_ids)
    assert ids == prompt_ids(TOKENIZER, SHORT, 84, 56)


def test_text_messages_are_accepted_by_the_chat_template() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n<think></think>"
