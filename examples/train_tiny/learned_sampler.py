"""Train the learned sampler of a checkpoint: which of a block's most probable tokens are safe to commit now?

The states of the first round are those that the confidence threshold visits; each further round adds states that the
trained sampler visits. The language model was not trained on the text, so that its confidence is as when it is used.

python examples/train_tiny/learned_sampler.py vllm_nld/checkpoints/tiny --states build/states
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import corpus
import numpy as np
import torch
import torch.nn.functional as F
from sampler_states import UNTRIED, Denoiser, States, Visitor, collect
from self_text import continue_greedily
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from vllm_nld.draft_pass.learned_sampler import Forecast, LearnedSampler, LearnedSamplerConfig
from vllm_nld.reference import ReferenceModel, load_reference

BATCH = 256


def collect_round(
    model: ReferenceModel, stream: np.ndarray, visitor: Visitor, lengths: list[int], batches: int
) -> States:
    """Return states of many batches of blocks, every other one after text that the model has continued itself."""
    parts = []
    for index in tqdm(range(batches), unit="batch", desc="denoising"):
        prefix = int(torch.randint(64, 145, (1,), generator=visitor.generator))
        prefixes = corpus.draw(stream, BATCH, prefix, visitor.generator)
        if index % 2:
            prefixes = continue_greedily(model, prefixes, int(torch.randint(1, 49, (1,), generator=visitor.generator)))
        with torch.inference_mode():
            states = collect(Denoiser(model, prefixes, lengths[index % len(lengths)]), visitor)
        parts.append(states.widen(max(lengths)))
    return States.join(parts)


def train(sampler: LearnedSampler, states: States, held_out: States, args: argparse.Namespace) -> None:
    """Minimize :func:`loss_of`; keep the weights that are best on held-out states."""
    optimizer = torch.optim.AdamW(sampler.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    steps = args.epochs * (len(states.tokens) // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(args.seed)
    best, kept = evaluate(sampler, held_out), copy.deepcopy(sampler.state_dict())
    tqdm.write(f"held-out loss of the model's own confidence: {best:.4f}")
    bar = tqdm(total=steps, unit="step", desc="training")
    while bar.n < steps:
        order = torch.randperm(len(states.tokens), generator=generator)
        for rows in order.split(args.batch)[: len(order) // args.batch]:
            loss = loss_of(sampler.train(), states.take(rows))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(sampler.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
            if bar.n % 200 == 0 or bar.n == steps:
                found = evaluate(sampler, held_out)
                if found < best:
                    best, kept = found, copy.deepcopy(sampler.state_dict())
                bar.set_postfix(loss=f"{loss.item():.4f}", held_out=f"{found:.4f}", best=f"{best:.4f}")
    sampler.load_state_dict(kept)


@torch.inference_mode()
def evaluate(sampler: LearnedSampler, states: States) -> float:
    """Return the mean loss over many states."""
    parts = torch.arange(len(states.tokens)).split(1024)
    losses = [float(loss_of(sampler.eval(), states.take(rows))) * len(rows) for rows in parts]
    return sum(losses) / len(states.tokens)


def loss_of(sampler: LearnedSampler, states: States) -> Tensor:
    """Return the mean cross-entropy of "is it right", plus that of the share of tokens that a trial kept."""
    forecast = sampler(states.tokens.long(), states.features.float(), states.present)
    right = F.binary_cross_entropy_with_logits(forecast.right[states.masked], states.right[states.masked].float())
    return right + 2 * trial_loss(forecast, states)


def trial_loss(forecast: Forecast, states: States) -> Tensor:
    """Cross-entropy of the share of tokens that a trial kept; shares of positions committed together multiply."""
    tried = states.lost != UNTRIED
    kept = F.logsigmoid(torch.where(states.right, forecast.kept_if_right, forecast.kept_if_wrong))
    together = (kept[:, None] * states.trials).sum(-1)[tried]
    share = 1 - (states.lost / states.present.sum(1, keepdim=True))[tried]
    # The lowest possible loss is subtracted, to show the possible gain.
    floor = torch.special.entr(share) + torch.special.entr(1 - share)
    changed = torch.log1p(-together.exp().clamp(max=1 - 1e-6))
    return (-(share * together + (1 - share) * changed) - floor).mean()


def compressed_embedding(model: ReferenceModel, dims: int) -> Tensor:
    """Return the embedding's first principal components ``[vocab, dims]``, scaled to unit variance over all."""
    table = model.encoder.embed_tokens.weight.detach().float()
    table = table - table.mean(0)
    _, _, directions = torch.pca_lowrank(table, q=dims, center=False, niter=8)
    projected = table @ directions
    return projected / projected.std()


def new_sampler(model: ReferenceModel, args: argparse.Namespace) -> LearnedSampler:
    """Return an untrained sampler."""
    config = LearnedSamplerConfig(
        vocab_size=model.config.vocab_size, d_model=args.d_model, layers=args.layers, heads=4,
        feed_forward=2 * args.d_model, dropout=args.dropout,
    )  # fmt: skip
    sampler = LearnedSampler(config)
    sampler.token_features.copy_(compressed_embedding(model, config.token_dims))
    return sampler


def load_fast(checkpoint: Path) -> ReferenceModel:
    """Load in bfloat16, which is several times faster and hardly changes the labels; rotations stay exact."""
    model = load_reference(checkpoint, torch.bfloat16)
    model.inverse_frequencies = load_reference(checkpoint).inverse_frequencies
    return model


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[12], help=f"a round's batches of {BATCH} blocks")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 16, 8], help="block lengths, taken in turn")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--d-model", type=int, default=128, help="384 in the paper, for models of 3B and more")
    parser.add_argument("--layers", type=int, default=2, help="4 in the paper")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--states", type=Path, required=True, help="folder that keeps the states of each round")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Collect states, train and save, once per round."""
    args = parse()
    torch.manual_seed(args.seed)
    args.states.mkdir(parents=True, exist_ok=True)
    model, sampler = load_fast(args.checkpoint), None
    texts = corpus.unseen_documents()
    stream = corpus.encode(texts, Tokenizer.from_file(str(args.checkpoint / "tokenizer.json")))
    seen, unseen = np.split(stream, [int(0.93 * len(stream))])
    known: list[States] = []
    held_out: list[States] = []
    for number, batches in enumerate(args.batches):
        file = args.states / f"round-{number}.pt"
        if not file.is_file():
            generator = torch.Generator().manual_seed(args.seed + number)
            visitor = Visitor(sampler, generator)
            found = collect_round(model, seen, visitor, args.lengths, batches)
            checks = collect_round(model, unseen, visitor, args.lengths, max(3, batches // 15))
            torch.save([vars(found), vars(checks)], file)
        found, checks = (States(**saved) for saved in torch.load(file))
        known.append(found)
        held_out.append(checks)
        trained = args.states / f"sampler-{number}"
        if trained.is_dir():
            sampler = LearnedSampler.load(trained)
            continue
        sampler = new_sampler(model, args)
        train(sampler, States.join(known), States.join(held_out), args)
        sampler.save(trained)
    assert sampler is not None
    sampler.save(args.checkpoint / "learned_sampler")


if __name__ == "__main__":
    main()
