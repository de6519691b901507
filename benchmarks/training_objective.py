"""The published objective of the draft adapter's training against the earlier one, with several seeds each.

    python benchmarks/training_objective.py CHECKPOINT --output build/objectives [--seeds 4] [--steps 200]

Within a seed, text, steps and start are the same. It trains on the standard library, as
``examples/train_tiny/draft_adapter.py`` does. A run that is finished is not repeated, and an interrupted one goes on.
Acceptance is measured on texts that the model wrote after held-out prompts: greedy ones, and ones drawn at temperature
1. Differences are within a seed; the interval is Student's, over the seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from vllm_nld.errors import NLDError
from vllm_nld.reference import DraftAdapter, ReferenceModel
from vllm_nld.training import Settings, Trainer, acceptance
from vllm_nld.training.objective import Drafts, Objective, Support, Target, lk_hybrid
from vllm_nld.training.text import Rows, Stream, continue_greedily
from vllm_nld.training.trainer import Schedule, load_frozen

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "train_tiny"))
import draft_adapter

SETTINGS: dict[str, Any] = {
    "rank": 32, "targets": "all", "mask_row": True, "learning_rate": 4e-4, "warm_up": 10, "batch": 8, "blocks": 8,
    "prefix_tokens": 112, "new_tokens": 80, "held_out_rows": 8,
}  # fmt: skip
"""Of every run; the others are the trainer's defaults, which are the published ones."""
QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's, for two-sided 95 %, by degrees of freedom."""


@dataclass(frozen=True)
class EarlierObjective(Objective):
    """What the trainer had before it followed the paper: every draft counts the same, however long its block is; and
    the cross-entropy is over the whole vocabulary."""

    def _shares(self, drafts: Drafts) -> Tensor:
        return drafts.counted.float()

    def _part_sum(self, model: ReferenceModel, judges: Tensor, tokens: Tensor, hidden: Tensor, share: Tensor) -> Tensor:
        found = model.logits(hidden)
        with torch.no_grad():
            wanted = model.logits(judges)
            support = Support.of(wanted, found, self.top_k)
        cross_entropy = torch.nn.functional.cross_entropy(found, tokens, reduction="none")
        matching = lk_hybrid(*(support.log_softmax(logits, self.temperature) for logits in (wanted, found)), self.eta)
        return ((self.kl_weight * matching + self.ce_weight * cross_entropy) * share).sum()


@dataclass(frozen=True)
class Way:
    """A way to train: what it changes in the settings, and its loss."""

    changed: dict[str, Any]
    objective: type[Objective] = Objective


WAYS = {
    "published": Way({}),
    "earlier": Way({"eta": 3.0, "drawn_share": 0.0}, EarlierObjective),
}


@dataclass(frozen=True)
class HeldOut:
    """What every adapter is measured on.

    Attributes:
        greedy: held-out prompts and the model's own greedy texts.
        drawn: the same prompts, and texts drawn at temperature 1.
    """

    greedy: Rows
    drawn: Rows

    @classmethod
    @torch.no_grad()
    def of(cls, model: ReferenceModel, stream: Stream, count: int, prefix: int, new_tokens: int) -> HeldOut:
        """Draw the prompts and continue them, with a seed of its own."""
        generator = torch.Generator().manual_seed(2026)
        prompts = stream.rows(stream.held_out, count, prefix, 0, 0, generator).ids

        def draw(logits: Tensor) -> Tensor:
            return torch.multinomial(logits[:, 0].softmax(-1), 1, generator=generator)

        texts = [
            continue_greedily(model, prompts, new_tokens),
            continue_greedily(model, prompts, new_tokens, None, draw),
        ]
        return cls(*(Rows.even(text, prefix) for text in texts))


@torch.no_grad()
def sampled_cycles(
    model: ReferenceModel, adapter: DraftAdapter | None, rows: Rows, block_length: int
) -> list[list[int]]:
    """Return the tokens of each cycle of sampled self-speculation, per row of text drawn at temperature 1.

    The text comes from the causal pass's distribution p, and q is the draft's. A token x of it counts as an accepted
    draft with the chance min(1, q(x) / p(x)); where it does not, x is distributed as what rejection sampling draws
    instead of a draft. So a walk through the text with such coins is rejection sampling (Leviathan et al. 2023).
    """
    coins = torch.Generator().manual_seed(0)
    cycles = []
    for part in rows.split(16):
        begin, last = int(part.begins[0]), part.ids.shape[1] - block_length
        starts = torch.arange(begin, last + 1).expand(len(part), -1)
        target = Target.of(model, part.ids)
        log_p = model.logits(target.hidden[:, :-1]).log_softmax(-1).gather(-1, part.ids[:, 1:, None]).squeeze(-1)
        emitted = []
        for piece in torch.split(starts, 16, dim=1):
            drafts = Drafts.over(model, adapter, target, piece, block_length)
            text = part.ids.gather(1, (drafts.rows + 1).flatten(1)).view(drafts.rows.shape)
            log_q = model.logits(drafts.hidden).log_softmax(-1).gather(-1, text[..., None]).squeeze(-1)
            chance = (log_q - log_p.gather(1, drafts.rows.flatten(1)).view(drafts.rows.shape)).exp()
            accepted = torch.rand(chance.shape, generator=coins) < chance
            emitted.append(1 + accepted.long().cumprod(-1).sum(-1))
        cycles += [acceptance.walk(row, [False] * len(row)) for row in torch.cat(emitted, dim=1).tolist()]
    return cycles


@dataclass(frozen=True)
class Bench:
    """Trains and measures.

    Attributes:
        model: frozen.
        stream: text to train on, and held-out text.
        output: a folder a run.
        settings: of all runs but for what their ways change.
        held_out_rows: to measure on.
    """

    model: ReferenceModel
    stream: Stream
    output: Path
    settings: dict[str, Any]
    held_out_rows: int

    @cached_property
    def held_out(self) -> HeldOut:
        """The texts to measure on."""
        sizes = self.settings["prefix_tokens"], self.settings["new_tokens"]
        return HeldOut.of(self.model, self.stream, self.held_out_rows, *sizes)

    def measured(self, adapter: DraftAdapter | None) -> dict[str, Any]:
        """Return both acceptance lengths of an adapter, and the share of greedy cycles that accept each position."""
        block_length = self.model.config.block_size
        greedy = acceptance.measure(self.model, adapter, self.held_out.greedy, block_length, batch=16)
        sampled = acceptance.Acceptance(
            sampled_cycles(self.model, adapter, self.held_out.drawn, block_length), block_length
        )
        positions = [round(share, 4) for share in greedy.by_position]
        return {"greedy": greedy.length, "sampled": sampled.length, "by_position": positions}

    def result(self, name: str, seed: int, steps: int, progress: Progress) -> dict[str, Any]:
        """Train one adapter and measure it, unless that was done before."""
        way, folder = WAYS[name], self.output / f"{name}-{seed}"
        report = folder / "measured.json"
        if report.is_file():
            found: dict[str, Any] = json.loads(report.read_text())
            return found
        settings = Settings.of(**self.settings, **way.changed, steps=steps, seed=seed)
        trainer = Trainer(self.model, self.stream, settings, folder)
        trainer.objective = way.objective(**vars(trainer.objective))
        shared = self.output / f"text-{seed}"
        if shared.is_dir() and not trainer.state_folder.is_dir():
            trainer.begin(False)
            shutil.copytree(shared, trainer.state_folder, dirs_exist_ok=True)
        else:
            trainer.begin((trainer.state_folder / "state.pt").is_file())
        trainer.run(Schedule(measure_every=steps), progress)
        if not shared.is_dir():
            shared.mkdir()
            for file in ("own_text.pt", "held_out.pt"):
                shutil.copy(trainer.state_folder / file, shared / file)
        found = {"way": name, "seed": seed, "steps": steps, **self.measured(trainer.adapter)}
        report.write_text(json.dumps(found) + "\n")
        return found


def compare(results: list[dict[str, Any]], base: dict[str, Any]) -> str:
    """Return a Markdown table: each way's mean over the seeds, and its difference from the published one in percent."""
    lines = ["| Way | Seeds | Greedy | Difference | Sampled | Difference |", "|---|---|---|---|---|---|"]
    lines.append(f"| no adapter | | {base['greedy']:.3f} | | {base['sampled']:.3f} | |")
    by_way = {name: {one["seed"]: one for one in results if one["way"] == name} for name in WAYS}
    for name, runs in by_way.items():
        cells = [name, str(len(runs))]
        for figure in ("greedy", "sampled"):
            lengths = [run[figure] for run in runs.values()]
            cells += [f"{statistics.mean(lengths):.3f}", ""]
            if name != "published":
                published = [by_way["published"][seed][figure] for seed in runs]
                pairs = zip(lengths, published, strict=True)
                cells[-1] = difference([100 * (one / other - 1) for one, other in pairs])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def difference(percents: list[float]) -> str:
    """Return the mean of differences and its 95 % interval."""
    mean = statistics.mean(percents)
    if len(percents) - 1 not in QUANTILES:
        return f"{mean:+.1f} %"
    reach = QUANTILES[len(percents) - 1] * statistics.stdev(percents) / math.sqrt(len(percents))
    return f"{mean:+.1f} % ({mean - reach:+.1f} to {mean + reach:+.1f})"


def main() -> None:
    """Train, measure, and print the comparison after each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--held-out-rows", type=int, default=128)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        settings = SETTINGS | {"rows": args.steps * SETTINGS["batch"]}
        model = load_frozen(args.checkpoint, torch.float32, "cpu")
        bench = Bench(model, draft_adapter.stream(args.checkpoint), args.output, settings, args.held_out_rows)
        base, results = bench.measured(None), []
        with Progress(console=Console(stderr=True)) as progress:
            for seed in range(args.seeds):
                results += [bench.result(name, seed, args.steps, progress) for name in WAYS]
                (args.output / "results.json").write_text(json.dumps({"base": base, "runs": results}, indent=1) + "\n")
                print(compare(results, base), flush=True)
    except NLDError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
