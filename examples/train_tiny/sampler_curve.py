"""Accuracy against tokens per forward: confidence threshold and learned sampler, on held-out text.

Accuracy is the share of a block's tokens that equal what serial denoising (one position per forward) makes of the same
block behind the same prefix. Prefixes are true text, so that every sampler fills the same blocks.

python examples/train_tiny/sampler_curve.py vllm_nld/checkpoints/tiny --plot docs/learned_sampler.png
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learned_sampler import denoise_serially
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from vllm_nld.checkpoints.held_out import HELD_OUT_MODULES
from vllm_nld.learned_sampler import LearnedSampler
from vllm_nld.reference import KVCache, ReferenceModel, load_reference

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
PREFIX = 128


def held_out_prefixes(tokenizer: Tokenizer, count: int, seed: int) -> Tensor:
    """Return int64 ``[count, PREFIX]``: pieces of the held-out modules."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = [(root / name).read_text(encoding="utf-8") for name in HELD_OUT_MODULES if (root / name).is_file()]
    streams = [np.asarray(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        stream = streams[index % len(streams)]
        start = generator.integers(len(stream) - PREFIX)
        rows.append(torch.from_numpy(stream[start : start + PREFIX]))
    return torch.stack(rows).long()


@torch.inference_mode()
def fill(
    model: ReferenceModel, cache: KVCache, blocks: Tensor, threshold: float, sampler: LearnedSampler | None
) -> tuple[Tensor, Tensor]:
    """Return the filled blocks ``[rows, length]`` and each one's number of forwards ``[rows]``."""
    blocks, forwards = blocks.clone(), torch.zeros(len(blocks), dtype=torch.int64)
    while (masked := blocks == model.config.mask_token_id).any():
        logits = model.bidirectional(blocks, cache)
        confidence = logits.softmax(-1).amax(-1).masked_fill(~masked, -1.0)
        score = confidence if sampler is None else sampler.correctness(logits, blocks, masked)
        best = torch.zeros_like(masked).scatter_(1, confidence.argmax(1, keepdim=True), True)
        blocks = torch.where(masked & (best | (score >= threshold)), logits.argmax(-1), blocks)
        forwards += masked.any(1)
    return blocks, forwards


def measure(model: ReferenceModel, sampler: LearnedSampler, prefixes: Tensor, length: int) -> list[dict[str, Any]]:
    """Return one row per sampler and threshold."""
    found: dict[tuple[str, float], list[tuple[Tensor, Tensor]]] = {}
    for batch in tqdm(prefixes.split(64), unit="batch"):
        with torch.inference_mode():
            cache = KVCache()
            seeds = model.causal(batch, cache)[:, -1].argmax(-1, keepdim=True)
            empty = torch.cat((seeds, torch.full((len(seeds), length - 1), model.config.mask_token_id)), dim=1)
            serial, _ = denoise_serially(model, cache, empty)
            for name, network in (("confidence_threshold", None), ("learned", sampler)):
                for threshold in THRESHOLDS:
                    blocks, forwards = fill(model, cache, empty, threshold, network)
                    same = (blocks == serial)[:, 1:].float().mean(1)
                    found.setdefault((name, threshold), []).append((same, forwards))
    rows = []
    for (name, threshold), parts in found.items():
        same, forwards = (torch.cat(list(column)).float() for column in zip(*parts, strict=True))
        rows.append(
            {
                "sampler": name,
                "threshold": threshold,
                "tpf_denoising": round(float(length / forwards.mean()), 3),
                "tpf": round(float(length / (forwards.mean() + 1)), 3),
                "accuracy": round(float(same.mean()), 4),
                "standard_error": round(float(same.std() / len(same) ** 0.5), 4),
            }
        )
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot both curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, label in (("confidence_threshold", "confidence threshold"), ("learned", "learned sampler")):
        own = [row for row in rows if row["sampler"] == name]
        columns = [[row[key] for row in own] for key in ("tpf_denoising", "accuracy", "standard_error")]
        axes.errorbar(columns[0], columns[1], yerr=columns[2], marker="o", capsize=2, label=label)
    axes.set_xlabel("tokens per denoising forward")
    axes.set_ylabel("share of tokens that serial denoising chooses")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--blocks", type=int, default=1024)
    parser.add_argument("--block-length", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    model = load_reference(args.checkpoint)
    sampler = LearnedSampler.load(args.checkpoint / "learned_sampler")
    tokenizer = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    rows = measure(model, sampler, held_out_prefixes(tokenizer, args.blocks, args.seed), args.block_length)
    if args.plot is not None:
        draw(rows, args.plot)
    print(json.dumps({"blocks": args.blocks, "block_length": args.block_length, "results": rows}))


if __name__ == "__main__":
    main()
