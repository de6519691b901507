"""The tiny vision-language model's configuration, tokenizer and prompts, and how it is written as a checkpoint."""

from __future__ import annotations

import random
from pathlib import Path

import corpus
import export
import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from vision_scenes import QUESTIONS, SHAPES, draw_scene

from vllm_nld.config import NemotronLabsDiffusionVLMConfig
from vllm_nld.names import VLM_ARCHITECTURE
from vllm_nld.reference import ReferenceVLM
from vllm_nld.vision.images import DEVIATION, MAX_IMAGE_SIZE, MEAN, grid_of, tokens_of

IMAGE_TOKENS = ("<|image_start|>", "<|image_pad|>", "<|image_break|>", "<|image_end|>")
IMAGE_IDS = 18, 19, 20, 21
"""The released model's, as the ids of the turn markers are."""
SPECIAL_TOKENS = [*corpus.SPECIAL_TOKENS, "<special_16>", "<special_17>", *IMAGE_TOKENS]
CELL = 28

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type in ('image', 'image_url') -%}{{ '<|image_start|>' }}
{%- elif part.type == 'text' -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n<think></think>' }}{%- endif -%}
"""


def tiny_vlm_config(vocab_size: int) -> NemotronLabsDiffusionVLMConfig:
    """Return the configuration: every released feature, at a size that one CPU core can train."""
    return NemotronLabsDiffusionVLMConfig(
        architectures=[VLM_ARCHITECTURE],
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters=export.rope_parameters(),
        block_size=16,
        mask_token_id=corpus.MASK_ID,
        bos_token_id=corpus.BOS_ID,
        eos_token_id=corpus.EOS_ID,
        pad_token_id=corpus.PAD_ID,
        dtype="bfloat16",
        vision_config={
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 224,
        },
    )


def train_tokenizer(most: int = 512) -> Tokenizer:
    """Train a byte-level BPE tokenizer in which each word of the captions and questions is a token."""
    rng = random.Random(0)
    scenes = [draw_scene(rng, held_out=False, shapes=SHAPES) for _ in range(500)]
    texts = [
        *QUESTIONS,
        "user\n",
        "assistant\n",
        *(scene.answer(question) for scene in scenes for question in QUESTIONS),
    ]
    return corpus.train_tokenizer(texts, most, SPECIAL_TOKENS)


def prompt_ids(tokenizer: Tokenizer, question: str, width: int, height: int) -> list[int]:
    """Return the prompt that the chat template and the image processor make of a question after one picture.

    Width and height are in pixels.
    """
    image = tokens_of(grid_of(width, height, MAX_IMAGE_SIZE, CELL), IMAGE_IDS)
    before = tokenizer.encode("<|im_start|>user\n", add_special_tokens=False)
    after = tokenizer.encode(f"{question}<|im_end|>\n<|im_start|>assistant\n<think></think>", add_special_tokens=False)
    return [*before.ids, *image, *after.ids]


def normalized(pixels: np.ndarray) -> Tensor:
    """Return what the tower reads, float32 ``[pictures, 3, height, width]``, of uint8 ``[pictures, height, width, 3]``.

    As :func:`vllm_nld.vision.images.pixels_of` does, but without its resizing.
    """
    scaled = (torch.from_numpy(pixels).float() / 255 - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    return scaled.permute(0, 3, 1, 2).contiguous()


def export_vlm(model: ReferenceVLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config, weights (bfloat16), tokenizer and chat template to ``folder``."""
    export.export(model, tokenizer, folder, CHAT_TEMPLATE, (*export.SPECIAL_TOKENS, *IMAGE_TOKENS))
