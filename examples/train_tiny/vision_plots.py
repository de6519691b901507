"""Draw the training curve of the tiny vision-language model, and some of its held-out pictures with its captions.

python examples/train_tiny/vision_plots.py build/tiny_vlm/log.jsonl vllm_nld/checkpoints/tiny_vlm docs/research
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluate_vision import MOST_TOKENS, pictures
from tokenizers import Tokenizer
from vision_checkpoint import prompt_ids
from vision_scenes import SHORT

from vllm_nld.cli.plot import file_pyplot
from vllm_nld.reference import ReferenceVLM, ar_generate, load_reference
from vllm_nld.vision.images import MAX_IMAGE_SIZE, pixels_of

LINES = {
    "short_ar": ("short caption, AR", "#1f77b4", "-"),
    "long_ar": ("long caption, AR", "#d62728", "-"),
    "short_diffusion": ("short caption, diffusion", "#1f77b4", ":"),
    "long_diffusion": ("long caption, diffusion", "#d62728", ":"),
}
SMOOTHED = 20
"""Steps whose mean is one point of a loss's line."""
SHOWN = 10
"""Pictures shown."""


def draw_curve(entries: list[dict[str, Any]], file: Path) -> None:
    """Draw losses, smoothed, and the share of held-out captions that are exactly right, against the step."""
    figure, (losses, shares) = file_pyplot().subplots(1, 2, figsize=(11, 4))
    for name, (label, color, style) in LINES.items():
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        groups = [points[at : at + SMOOTHED] for at in range(0, len(points), SMOOTHED)]
        steps, values = zip(*(np.mean(group, axis=0) for group in groups), strict=True)
        losses.plot(steps, values, style, color=color, label=label)
    losses.set(xlabel="step", ylabel="nats a token", yscale="log", title="Training loss")
    for name, color in (("short", "#1f77b4"), ("long", "#d62728")):
        points = [(entry["step"], entry[f"{name}_right"]) for entry in entries if f"{name}_right" in entry]
        steps, values = zip(*points, strict=True)
        shares.plot(steps, values, "o-", markersize=3, color=color, label=f"{name} caption")
    shares.set(xlabel="step", ylim=(0, 1.02), title="Held-out captions that are exactly right (greedy AR)")
    for axes in (losses, shares):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def draw_pictures(folder: Path, file: Path) -> None:
    """Draw held-out pictures, at three times their size, each with the model's short caption."""
    model, tokenizer = load_reference(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert isinstance(model, ReferenceVLM)
    figure, grid = file_pyplot().subplots(2, SHOWN // 2, figsize=(11, 4.4))
    for axes, (scene, picture) in zip(grid.flat, pictures(SHOWN, 3), strict=True):
        pixels = torch.from_numpy(pixels_of(picture, MAX_IMAGE_SIZE, model.config.image_cell))
        prompt = prompt_ids(tokenizer, SHORT, picture.width, picture.height)
        ids = ar_generate(model, prompt, MOST_TOKENS, images=[pixels]).ids[len(prompt) :]
        caption = tokenizer.decode(ids)
        axes.imshow(np.asarray(picture), extent=(0, picture.width, picture.height, 0))
        axes.set(xlim=(0, 84), ylim=(84, 0))
        axes.set_title(caption, fontsize=8, color="black" if caption == scene.short() else "red")
        axes.axis("off")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Write ``tiny_vlm.png`` and ``tiny_vlm_pictures.png``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    # A resumed run repeats the steps after the last saved one.
    entries = {entry["step"]: entry for entry in map(json.loads, args.log.read_text().splitlines())}
    draw_curve(sorted(entries.values(), key=lambda entry: entry["step"]), args.output / "tiny_vlm.png")
    draw_pictures(args.checkpoint, args.output / "tiny_vlm_pictures.png")


if __name__ == "__main__":
    main()
