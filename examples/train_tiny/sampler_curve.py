"""Accuracy against tokens per forward: confidence threshold and learned sampler, on held-out text.

Accuracy is the share of a block's tokens that equal what serial denoising (one position per forward) gives for the same
block after the same prefix. Prefixes are true text, so that every sampler fills the same blocks. The samplers are
compared in pairs, block by block, at equal tokens per forward (both curves interpolated).

python examples/train_tiny/sampler_curve.py vllm_nld/checkpoints/tiny --plot docs/research/learned_sampler.png
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learned_sampler import load_fast
from sampler_states import Denoiser, choose
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from vllm_nld.checkpoints.held_out import HELD_OUT_MODULES
from vllm_nld.draft_pass.learned_sampler import LearnedSampler
from vllm_nld.reference import ReferenceModel

THRESHOLDS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
MATCHED = (1.15, 1.2, 1.25, 1.3, 1.4, 1.5, 1.6, 1.8, 2.0, 2.25)
"""Tokens per denoising forward, in blocks of 16, at which the samplers are compared."""
PREFIX = 128
CONFIDENCE, LEARNED = "confidence_threshold", "learned"


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


Score = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Rows, logits, blocks, masked -> the score that the threshold applies to, ``[rows, length]``."""


def confidence_score(rows: Tensor, logits: Tensor, blocks: Tensor, masked: Tensor) -> Tensor:
    """Return the language model's own confidence."""
    return choose(logits, masked)[1]


def learned_score(sampler: LearnedSampler) -> Score:
    """Return the learned sampler's score."""
    return lambda rows, logits, blocks, masked: sampler.scores(logits, blocks, masked)


@torch.inference_mode()
def fill(denoiser: Denoiser, threshold: float, score: Score) -> tuple[Tensor, Tensor]:
    """Return the filled blocks ``[rows, length]`` and each one's number of forwards ``[rows]``."""
    filled, forwards = denoiser.empty.clone(), torch.zeros(len(denoiser.empty), dtype=torch.int64)
    rows = torch.arange(len(filled))
    while len(rows):
        blocks = filled[rows]
        masked = blocks == denoiser.mask_id
        logits = denoiser.logits(rows, blocks)
        tokens, _, surest = choose(logits, masked)
        chosen = masked & (surest | (score(rows, logits, blocks, masked) >= threshold))
        filled[rows] = torch.where(chosen, tokens, blocks)
        forwards[rows] += 1
        rows = rows[(filled[rows] == denoiser.mask_id).any(1)]
    return filled, forwards


@dataclass
class Point:
    """One sampler at one threshold: per block, the share of serial denoising's tokens and the forwards."""

    sampler: str
    threshold: float
    same: Tensor
    forwards: Tensor

    def row(self, length: int) -> dict[str, Any]:
        """Return the printed values."""
        return {
            "sampler": self.sampler,
            "threshold": self.threshold,
            "tpf_denoising": round(float(length / self.forwards.mean()), 3),
            "tpf": round(float(length / (self.forwards.mean() + 1)), 3),
            "accuracy": round(float(self.same.mean()), 4),
            "standard_error": round(float(self.same.std() / len(self.same) ** 0.5), 4),
        }


ScoresOf = Callable[[Denoiser, Tensor], dict[str, Score]]
"""The denoiser and serial denoising's blocks (for oracles) -> the scores to compare, by name."""


def measure(
    model: ReferenceModel, scores_of: ScoresOf, prefixes: Tensor, length: int, thresholds: Sequence[float] = THRESHOLDS
) -> list[Point]:
    """Fill a block after every prefix, with each score and threshold."""
    found: dict[tuple[str, float], list[tuple[Tensor, Tensor]]] = {}
    for batch in tqdm(prefixes.split(128), unit="batch"):
        with torch.inference_mode():
            denoiser = Denoiser(model, batch, length)
            serial = denoiser.settle(torch.arange(len(batch)), denoiser.empty)[:, 0]
        for name, score in scores_of(denoiser, serial).items():
            for threshold in thresholds:
                blocks, forwards = fill(denoiser, threshold, score)
                same = (blocks == serial)[:, 1:].float().mean(1)
                found.setdefault((name, threshold), []).append((same, forwards.float()))
    columns = {key: [torch.cat(list(column)) for column in zip(*parts, strict=True)] for key, parts in found.items()}
    return [Point(name, threshold, same, forwards) for (name, threshold), (same, forwards) in columns.items()]


def interpolate(points: list[Point], forwards: float) -> tuple[Tensor, Tensor, float] | None:
    """Return per block the accuracy and forwards, and the curve's slope, at this mean number of forwards."""
    ordered = sorted(points, key=lambda point: float(point.forwards.mean()))
    for low, high in pairwise(ordered):
        start, width = float(low.forwards.mean()), float((high.forwards - low.forwards).mean())
        if width > 0 and start <= forwards <= start + width:
            share = (forwards - start) / width
            slope = float((high.same - low.same).mean()) / width
            mixed = [torch.lerp(a, b, share) for a, b in ((low.same, high.same), (low.forwards, high.forwards))]
            return mixed[0], mixed[1], slope
    return None


def compare(points: list[Point], length: int) -> list[dict[str, float]]:
    """Return the paired difference, learned minus confidence, at equal tokens per forward."""
    curves = [[point for point in points if point.sampler == name] for name in (CONFIDENCE, LEARNED)]
    rows = []
    for tpf in MATCHED:
        found = [interpolate(curve, length / tpf) for curve in curves]
        if None in found:
            continue
        (same, forwards, slope), (other_same, other_forwards, other_slope) = found  # type: ignore[misc]
        # The means of the forwards are estimated from the same blocks, so a block's deviation from them counts with the
        # slope.
        worth = (slope + other_slope) / 2
        difference = (other_same - worth * other_forwards) - (same - worth * forwards)
        rows.append(
            {
                "tpf_denoising": tpf,
                "confidence_threshold": round(float(same.mean()), 4),
                "learned": round(float(other_same.mean()), 4),
                "difference": round(float(difference.mean()), 4),
                "standard_error": round(float(difference.std() / len(difference) ** 0.5), 4),
            }
        )
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot both curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, label in ((CONFIDENCE, "confidence threshold"), (LEARNED, "learned sampler")):
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
    model = load_fast(args.checkpoint)
    sampler = LearnedSampler.load(args.checkpoint / "learned_sampler")
    tokenizer = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    prefixes = held_out_prefixes(tokenizer, args.blocks, args.seed)
    scores = {CONFIDENCE: confidence_score, LEARNED: learned_score(sampler)}
    points = measure(model, lambda *_: scores, prefixes, args.block_length)
    rows = [point.row(args.block_length) for point in points]
    if args.plot is not None:
        draw(rows, args.plot)
    matched = compare(points, args.block_length)
    print(json.dumps({"blocks": args.blocks, "block_length": args.block_length, "results": rows, "matched": matched}))


if __name__ == "__main__":
    main()
