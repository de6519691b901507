"""How much room there is above the confidence threshold, and where the learned sampler's gain comes from.

Curves as in ``sampler_curve.py``, for: the confidence threshold; confidence adjusted for the share of the block that is
still open; only the learned sampler's probability that the token is right; its score; and two oracles. One commits what
confidence would, if it is the token that serial denoising ends with; the other commits what a trial finds to be free.
Then, on the states that the learned sampler visits: how well the scores separate right from wrong, and free from
costly.

python examples/train_tiny/sampler_room.py vllm_nld/checkpoints/tiny
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from learned_sampler import load_fast
from sampler_curve import CONFIDENCE, LEARNED, Score, confidence_score, held_out_prefixes, learned_score, measure
from sampler_states import TRIALS, UNTRIED, Denoiser, States, Visitor, choose, collect
from tokenizers import Tokenizer
from torch import Tensor

from vllm_nld.draft_pass.learned_sampler import WRONG_COST, LearnedSampler, statistics
from vllm_nld.reference import ReferenceModel

THRESHOLDS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def paced_score(rows: Tensor, logits: Tensor, blocks: Tensor, masked: Tensor) -> Tensor:
    """Confidence, adjusted for the damage of a wrong token: the share of the block that is still masked."""
    return 1 - (1 - choose(logits, masked)[1]) * 2 * masked.float().mean(1, keepdim=True)


def right_score(sampler: LearnedSampler) -> Score:
    """Return the predicted probability that the token is right."""

    def score(rows: Tensor, logits: Tensor, blocks: Tensor, masked: Tensor) -> Tensor:
        tokens, present = torch.where(masked, logits.argmax(-1), blocks), torch.ones_like(masked)
        predicted: Tensor = sampler(tokens, statistics(logits, masked, present), present).right.sigmoid()
        return predicted

    return score


def right_oracle(serial: Tensor) -> Score:
    """Return confidence where the token is the one that serial denoising ends with, else 0."""
    return lambda rows, logits, blocks, masked: choose(logits, masked)[1] * (logits.argmax(-1) == serial[rows])


def cost_oracle(denoiser: Denoiser) -> Score:
    """Return the learned score's true value: the cost of committing each position besides the surest."""

    def score(rows: Tensor, logits: Tensor, blocks: Tensor, masked: Tensor) -> Tensor:
        tokens, _, surest = choose(logits, masked)
        paths = denoiser.settle(rows, blocks)
        state, position = (masked & ~surest).nonzero(as_tuple=True)
        one = torch.nn.functional.one_hot(position, blocks.shape[1]).bool() | surest[state]
        after = denoiser.settle(rows[state], torch.where(one, tokens[state], blocks[state]), paths[state])
        lost = torch.zeros(masked.shape)
        lost[state, position] = (after[:, 0] != paths[state, 0]).float().mean(1)
        return 1 - lost / WRONG_COST

    return score


def area(score: Tensor, positive: Tensor) -> float:
    """Return the area under the ROC curve."""
    ranks = torch.empty(len(score))
    ranks[score.argsort()] = torch.arange(len(score), dtype=torch.float32)
    count = int(positive.sum())
    return float((ranks[positive].sum() - count * (count - 1) / 2) / (count * (len(score) - count)))


@torch.inference_mode()
def areas(model: ReferenceModel, sampler: LearnedSampler, prefixes: Tensor, length: int) -> dict[str, dict[str, float]]:
    """Return how well confidence and the learned sampler separate positions, on the states that the latter visits."""
    generator = torch.Generator().manual_seed(0)
    visitor = Visitor(sampler, generator, tried=1.0, tried_wrong=1.0, noise=0.0)
    states = States.join([collect(Denoiser(model, batch, length), visitor) for batch in prefixes.split(128)])
    forecast = sampler(states.tokens.long(), states.features.float(), states.present)
    confidence, uncertain = states.features[..., 0].float(), states.masked & (states.features[..., 0] >= 0.4)
    single = states.lost[:, : TRIALS - 1] != UNTRIED
    state, trial = single.nonzero(as_tuple=True)
    position = states.trials[state, trial].int().argmax(-1)
    free = states.lost[state, trial] == 0
    right = states.right[uncertain]
    return {
        "right, confidence at least 0.4": {
            CONFIDENCE: area(confidence[uncertain], right),
            LEARNED: area(forecast.right[uncertain], right),
        },
        "free": {
            CONFIDENCE: area(confidence[state, position], free),
            LEARNED: area(forecast.score()[state, position], free),
        },
        "share free": {
            "right": float(free[states.right[state, position]].float().mean()),
            "all": float(free.float().mean()),
        },
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--blocks", type=int, default=256)
    parser.add_argument("--block-length", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    model, sampler = load_fast(args.checkpoint), LearnedSampler.load(args.checkpoint / "learned_sampler")
    tokenizer = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    prefixes = held_out_prefixes(tokenizer, args.blocks, args.seed)
    plain = {
        CONFIDENCE: confidence_score,
        "confidence_paced": paced_score,
        "learned_right_only": right_score(sampler),
        LEARNED: learned_score(sampler),
    }
    points = measure(
        model,
        lambda denoiser, serial: plain | {"oracle_right": right_oracle(serial)},
        prefixes,
        args.block_length,
        THRESHOLDS,
    )
    few = prefixes[: args.blocks // 4]
    points += measure(
        model, lambda denoiser, _: {"oracle_cost": cost_oracle(denoiser)}, few, args.block_length, (0.4, 0.8, 0.98)
    )
    found = {
        "blocks": args.blocks,
        "results": [point.row(args.block_length) for point in points],
        "areas_under_roc": areas(model, sampler, prefixes, args.block_length),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
