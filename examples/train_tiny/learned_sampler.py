"""Train the learned sampler of a checkpoint: which of a block's most probable tokens are right?

Right means: the token that serial denoising (one position per forward, the surest first) of the same block ends with.
States come from that serial run, and from commits of several right tokens at once, as a sampler in use makes them.

python examples/train_tiny/learned_sampler.py vllm_nld/checkpoints/tiny
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path

import corpus
import numpy as np
import torch
import torch.nn.functional as F
from self_text import own_text
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from vllm_nld.learned_sampler import LearnedSampler, LearnedSamplerConfig, statistics
from vllm_nld.reference import KVCache, ReferenceModel, load_reference


@dataclass
class States:
    """Partly denoised blocks: the predicted (or committed) tokens, what is masked, the features, the labels.

    ``present`` is False behind the end of a block that is shorter than others.
    """

    tokens: Tensor
    masked: Tensor
    features: Tensor
    right: Tensor
    present: Tensor

    @classmethod
    def join(cls, parts: list[States]) -> States:
        """Concatenate along the first dimension."""
        names = ("tokens", "masked", "features", "right", "present")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def look(model: ReferenceModel, cache: KVCache, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run a bidirectional forward; returns the argmax tokens, their probability, and the sampler's statistics."""
    logits = model.bidirectional(blocks, cache)
    masked = blocks == model.config.mask_token_id
    tokens = torch.where(masked, logits.argmax(-1), blocks)
    confidence = logits.softmax(-1).amax(-1).masked_fill(~masked, -1.0)
    return tokens, confidence, statistics(logits, masked, torch.ones_like(masked))


def denoise_serially(model: ReferenceModel, cache: KVCache, blocks: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the finished blocks ``[rows, length]`` and every state on the way, the first included."""
    blocks, states = blocks.clone(), list[Tensor]()
    while (blocks == model.config.mask_token_id).any():
        states.append(blocks.clone())
        tokens, confidence, _ = look(model, cache, blocks)
        surest = confidence.argmax(1, keepdim=True)
        blocks.scatter_(1, surest, tokens.gather(1, surest))
    return blocks, states


def collect(model: ReferenceModel, prefixes: Tensor, length: int, generator: torch.Generator) -> States:
    """Return states of one block behind each prefix, int64 ``[rows, prefix]``."""
    mask_id, cache = model.config.mask_token_id, KVCache()
    seeds = model.causal(prefixes, cache)[:, -1].argmax(-1, keepdim=True)
    empty = torch.cat((seeds, torch.full((len(seeds), length - 1), mask_id)), dim=1)
    final, states = denoise_serially(model, cache, empty)
    parts: list[States] = []

    def keep(blocks: Tensor) -> tuple[Tensor, Tensor]:
        tokens, confidence, features = look(model, cache, blocks)
        masked = blocks == mask_id
        parts.append(States(tokens.short(), masked, features.half(), tokens == final, torch.ones_like(masked)))
        return tokens, confidence

    for blocks in states[:: max(1, len(states) // 6)]:
        keep(blocks)
    for threshold in (0.3, 0.5, 0.7, 0.9):  # what parallel samplers visit, wrong commits undone
        blocks = empty.clone()
        for _ in range(3):
            tokens, confidence = keep(blocks)
            commit = (confidence >= threshold) & (tokens == final)
            commit |= F.one_hot(confidence.argmax(1), length).bool() & (tokens == final)
            blocks = torch.where(commit, tokens, blocks)
    for share in (0.2, 0.5, 0.8):  # any subset
        keep(torch.where(torch.rand(final.shape, generator=generator) < share, final, empty))
    return States.join([part for part in parts if part.masked.any()])


def collect_all(
    model: ReferenceModel, stream: np.ndarray, args: argparse.Namespace, generator: torch.Generator
) -> dict[int, list[States]]:
    """Return states by block length, behind real text that the model has continued a little by itself."""
    rows = own_text(model, stream, args.blocks, prefix=96, new_tokens=48, seed=args.seed)
    parts: dict[int, list[States]] = {}
    with torch.inference_mode():
        for index, batch in enumerate(tqdm(rows.split(64), unit="batch", desc="denoising")):
            end = 96 + int(torch.randint(48, (1,), generator=generator))
            length = args.lengths[index % len(args.lengths)]
            parts.setdefault(length, []).append(collect(model, batch[:, :end], length, generator))
    return parts


def train(sampler: LearnedSampler, states: States, held_out: States, args: argparse.Namespace) -> None:
    """Minimise the binary cross-entropy of the masked positions; keep the weights that did best on held-out blocks."""
    optimizer = torch.optim.AdamW(sampler.parameters(), lr=args.learning_rate, weight_decay=0.05)
    steps = args.epochs * (len(states.tokens) // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(args.seed)
    best, kept = evaluate(sampler, held_out), copy.deepcopy(sampler.state_dict())
    tqdm.write(f"held-out loss of the model's own confidence: {best:.4f}")
    bar = tqdm(total=steps, unit="step", desc="training")
    while bar.n < steps:
        order = torch.randperm(len(states.tokens), generator=generator)
        for rows in order.split(args.batch)[: len(order) // args.batch]:
            loss = loss_of(sampler.train(), states, rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
            if bar.n % 100 == 0:
                found = evaluate(sampler, held_out)
                if found < best:
                    best, kept = found, copy.deepcopy(sampler.state_dict())
                bar.set_postfix(loss=f"{loss.item():.4f}", held_out=f"{found:.4f}", best=f"{best:.4f}")
    sampler.load_state_dict(kept)


@torch.inference_mode()
def evaluate(sampler: LearnedSampler, states: States) -> float:
    """Return the mean loss over many states."""
    parts = torch.arange(len(states.tokens)).split(1024)
    losses = [loss_of(sampler.eval(), states, rows) * int(states.masked[rows].sum()) for rows in parts]
    return float(sum(losses) / states.masked.sum())


def loss_of(sampler: LearnedSampler, states: States, rows: Tensor) -> Tensor:
    """Return the mean loss over the masked positions of some states."""
    masked = states.masked[rows]
    logits = sampler(states.tokens[rows].long(), states.features[rows].float(), states.present[rows])
    return F.binary_cross_entropy_with_logits(logits[masked], states.right[rows][masked].float())


def compressed_embedding(model: ReferenceModel, dims: int) -> Tensor:
    """Return the embedding's first principal components ``[vocab, dims]``, scaled to unit variance over all."""
    table = model.encoder.embed_tokens.weight.detach().float()
    table = table - table.mean(0)
    _, _, directions = torch.pca_lowrank(table, q=dims, center=False, niter=8)
    projected = table @ directions
    return projected / projected.std()


def main() -> None:
    """Collect states, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--blocks", type=int, default=6144, help="blocks to denoise")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 16, 8], help="block lengths, taken in turn")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--d-model", type=int, default=128, help="384 in the paper, for models of 3B and more")
    parser.add_argument("--layers", type=int, default=2, help="4 in the paper")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--states", type=Path, help="keep the collected states here, to train again without collecting")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = load_reference(args.checkpoint)
    stream = corpus.encode(corpus.documents(), Tokenizer.from_file(str(args.checkpoint / "tokenizer.json")))
    if args.states is None or not args.states.is_file():
        parts = collect_all(model, stream, args, generator)
        if args.states is not None:
            torch.save({length: [vars(part) for part in listed] for length, listed in parts.items()}, args.states)
    else:
        saved = torch.load(args.states)
        parts = {length: [States(**part) for part in listed] for length, listed in saved.items()}
    states, held_out = pad_and_split(parts)
    config = LearnedSamplerConfig(
        vocab_size=model.config.vocab_size, d_model=args.d_model, layers=args.layers, heads=4,
        feed_forward=2 * args.d_model, dropout=args.dropout,
    )  # fmt: skip
    sampler = LearnedSampler(config)
    sampler.token_features.copy_(compressed_embedding(model, config.token_dims))
    train(sampler, states, held_out, args)
    sampler.save(args.checkpoint / "learned_sampler")


def pad_and_split(parts: dict[int, list[States]]) -> tuple[States, States]:
    """Return training states, and those of each length's last tenth of batches, held out; shorter blocks are padded."""
    longest = max(parts)

    def widen(state: States) -> States:
        short = longest - state.tokens.shape[1]
        return States(
            F.pad(state.tokens, (0, short)),
            F.pad(state.masked, (0, short)),
            F.pad(state.features, (0, 0, 0, short)),
            F.pad(state.right, (0, short)),
            F.pad(state.present, (0, short)),
        )

    ends = {length: -max(1, len(listed) // 10) for length, listed in parts.items()}
    train_parts = [widen(part) for length, listed in parts.items() for part in listed[: ends[length]]]
    held_out = [widen(part) for length, listed in parts.items() for part in listed[ends[length] :]]
    return States.join(train_parts), States.join(held_out)


if __name__ == "__main__":
    main()
