"""Caption held-out pictures with the dense reference: how many are exactly right, and how many forwards they take.

python examples/train_tiny/evaluate_vision.py vllm_nld/checkpoints/tiny_vlm

Prints one JSON object. Tokens per forward are counted as in the paper: NFE without the prefill.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from vision_checkpoint import prompt_ids
from vision_scenes import LONG, SHORT, SIZES, Scene, draw_scene, render

from vllm_nld.reference import ReferenceVLM, ar_generate, generate, linear_spec_generate, load_reference
from vllm_nld.vision.images import MAX_IMAGE_SIZE, pixels_of

QUESTIONS = {"short": SHORT, "long": LONG}
MOST_TOKENS = 64
THRESHOLD = 0.9


@dataclass
class Tally:
    """What one mode did with one question.

    Attributes:
        right: captions that are exactly right.
        as_ar: captions that equal the AR caption.
        tokens: generated, with end tokens.
        forwards: that they took, without the prefill.
        cycles: of self-speculation.
    """

    right: int = 0
    as_ar: int = 0
    tokens: int = 0
    forwards: int = 0
    cycles: int = 0

    def add(self, caption: list[int], wanted: list[int], ar: list[int], forwards: int, cycles: int = 0) -> None:
        """Count one caption."""
        self.right += caption == wanted
        self.as_ar += caption == ar
        self.tokens += len(caption)
        self.forwards += forwards
        self.cycles += cycles

    def summary(self, pictures: int) -> dict[str, Any]:
        """Return shares and ratios."""
        found = {
            "right": self.right / pictures,
            "as_ar": self.as_ar / pictures,
            "tokens_per_caption": self.tokens / pictures,
            "tokens_per_forward": self.tokens / self.forwards,
        }
        # The first token comes from the prefill, all others from cycles.
        return found | ({"acceptance_length": (self.tokens - pictures) / self.cycles} if self.cycles else {})


def pictures(count: int, seed: int) -> list[tuple[Scene, Image.Image]]:
    """Return held-out scenes with their pictures; each size is taken in turn."""
    rng = random.Random(seed)
    found = []
    for index in range(count):
        scene = draw_scene(rng, held_out=True)
        size = SIZES[index % len(SIZES)]
        found.append((scene, render(scene, size, rng)))
    return found


def caption_in_all_modes(
    model: ReferenceVLM, prompt: list[int], pixels: Tensor, wanted: list[int], tallies: dict[str, Tally]
) -> list[int]:
    """Caption one picture in each mode, and count; returns AR's caption."""
    ar = ar_generate(model, prompt, MOST_TOKENS, images=[pixels])
    text = ar.ids[len(prompt) :]
    tallies["ar"].add(text, wanted, text, ar.nfe)
    drafted = linear_spec_generate(model, prompt, MOST_TOKENS, images=[pixels])
    tallies["self_speculation"].add(drafted.ids[len(prompt) :], wanted, text, drafted.nfe - 1, len(drafted.drafts))
    denoised = generate(model, prompt, MOST_TOKENS, threshold=THRESHOLD, images=[pixels])
    tallies["diffusion"].add(denoised.ids[len(prompt) :], wanted, text, denoised.nfe)
    return text


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    model = load_reference(args.checkpoint)
    assert isinstance(model, ReferenceVLM)
    tokenizer = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    tallies = {name: {mode: Tally() for mode in ("ar", "self_speculation", "diffusion")} for name in QUESTIONS}
    wrong: list[str] = []
    for scene, picture in tqdm(pictures(args.pictures, args.seed), mininterval=10):
        pixels = torch.from_numpy(pixels_of(picture, MAX_IMAGE_SIZE, model.config.image_cell))
        for name, question in QUESTIONS.items():
            prompt = prompt_ids(tokenizer, question, picture.width, picture.height)
            wanted = [
                *tokenizer.encode(scene.answer(question), add_special_tokens=False).ids,
                model.config.eos_token_id,
            ]
            caption = caption_in_all_modes(model, prompt, pixels, wanted, tallies[name])
            if caption != wanted:
                wrong.append(f"{scene.answer(question)} -> {tokenizer.decode(caption)}")
    found = {name: {mode: t.summary(args.pictures) for mode, t in modes.items()} for name, modes in tallies.items()}
    sizes = {"pictures": args.pictures, "block_length": model.config.block_size}
    print(json.dumps({**sizes, **found, "wrong": wrong[:10]}, indent=2))


if __name__ == "__main__":
    main()
