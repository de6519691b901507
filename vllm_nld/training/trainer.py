"""The training loop of the draft adapter: resumable, with a curve of the acceptance length on held-out text."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from vllm_nld.checkpoints.draft_lora import WEIGHTS_FILE, DraftLoRA
from vllm_nld.errors import NLDError
from vllm_nld.reference import DraftAdapter, ReferenceModel, load_reference
from vllm_nld.reference.generate import eos_ids
from vllm_nld.reference.rope import inverse_frequencies
from vllm_nld.training import acceptance
from vllm_nld.training.objective import Drafts, Draws, Objective, Target, next_cycles
from vllm_nld.training.settings import Settings
from vllm_nld.training.text import Corpus, Rows, digest, own_text, save

_ALIGNED = 16
"""Rows have a multiple of so many tokens where there is room: other widths cost CUDA's attention a copy of its mask."""


@dataclass(frozen=True)
class Schedule:
    """How a run is divided. Does not change what it computes.

    Attributes:
        save_every: steps between saves.
        measure_every: steps between measurements of the curve.
        minutes: stop (and save) after this time; None: at the end.
    """

    save_every: int = 50
    measure_every: int = 100
    minutes: float | None = None


def load_frozen(folder: Path, dtype: torch.dtype, device: str | torch.device) -> ReferenceModel:
    """Return the model of ``folder``, without gradients for its weights."""
    model = load_reference(folder, dtype, device).requires_grad_(False)
    model.config.name_or_path = folder.resolve().name
    if dtype != torch.float32:
        # Angles are computed from these, so they must not be rounded with the weights.
        frequencies = inverse_frequencies(model.config.head_dim, model.config.rope_parameters)
        model.inverse_frequencies = frequencies.float().to(device)
    # cuDNN's attention plans anew for every shape, which takes longer than a batch; batches differ in their lengths.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return model


def fresh_adapter(model: ReferenceModel, settings: Settings) -> DraftAdapter:
    """Return an untrained adapter, float32 on the CPU, which depends only on the seed and the model's shape."""
    generator = torch.Generator().manual_seed(settings.seed)
    row = model.encoder.embed_tokens.weight[model.config.mask_token_id] if settings.mask_row else None
    return DraftAdapter.fresh(model.config, settings.rank, settings.scale_alpha, generator, settings.targets, row)


def given_adapter(model: ReferenceModel, settings: Settings, folder: Path) -> DraftAdapter:
    """Return the adapter of a folder, float32 on the CPU, to train on; a higher rank widens it without changing it.

    Raises:
        NLDError: it is not one for this model, or it differs from what the settings say of the adapter.
    """
    try:
        given = DraftLoRA.open(folder, model.config)
    except NLDError as error:
        raise NLDError(f"--from {folder}: {str(error).removeprefix('draft_lora: ')}") from None
    has = f"the adapter of --from {folder} has"
    if settings.rank < given.rank:
        raise NLDError(f"--rank {settings.rank}: {has} rank {given.rank}; allowed: {given.rank} or more")
    alpha = given.scale * settings.rank
    if settings.scale_alpha != alpha:
        raise NLDError(f"--alpha {settings.scale_alpha:g}: {has} scale {given.scale:g}; allowed: {alpha:g}")
    if settings.targets != given.targets:
        targets = ",".join(given.targets)
        raise NLDError(f"--targets {','.join(settings.targets)}: {has} others; allowed: {targets}")
    if settings.mask_row != given.mask_row:
        row = "a row for the mask token; allowed: --mask-row" if given.mask_row else "no row for the mask token"
        raise NLDError(f"--mask-row {'on' if settings.mask_row else 'off'}: {has} {row}")
    return DraftAdapter.read(folder).widened(settings.rank, torch.Generator().manual_seed(settings.seed))


class Trainer:
    """Trains a draft adapter; only its matrices change.

    Args:
        model: frozen, as :func:`load_frozen` returns it.
        corpus: the text.
        settings: of the run.
        output: folder of the adapter and the run.
        start: folder of an adapter to begin with; None: a fresh one, which changes nothing yet.

    Raises:
        NLDError: the text or the adapter to begin with does not fit the settings or the model.

    Attributes:
        adapter: float32, on the model's device.
        step: steps done.
        seconds: of training so far.
        curve: measurements so far, each with ``step``, ``acceptance_length``, ``by_position`` and ``cycles``.
    """

    def __init__(
        self, model: ReferenceModel, corpus: Corpus, settings: Settings, output: Path, start: Path | None = None
    ) -> None:
        self.model, self.corpus, self.settings, self.output = model, corpus, settings, output
        self.device = model.diffusion_head.weight.device
        self.block_length = settings.block_length or model.config.block_size
        ends = frozenset(eos_ids(model, None))
        self.eos = ends if settings.own_text or corpus.answers else frozenset[int]()
        if corpus.answers and not ends:
            raise NLDError("MODEL: config.json has no eos_token_id, with which answers end; allowed: one, or some")
        self.pad = min(ends, default=0)
        self.objective = Objective(
            settings.kl_weight, settings.ce_weight, settings.temperature, settings.top_k, settings.eta, settings.beyond
        )
        if settings.new_tokens < self.block_length:
            raise NLDError(
                f"--new-tokens {settings.new_tokens}: allowed: the block length ({self.block_length}) or more"
            )
        corpus.check(settings)
        self.generator = torch.Generator().manual_seed(settings.seed)
        first = fresh_adapter(model, settings) if start is None else given_adapter(model, settings, start)
        self._start = "" if start is None else digest(*first.parameters)
        self.adapter = first.to(self.device)
        for matrix in self.adapter.parameters:
            matrix.requires_grad_()
        self.optimizer = torch.optim.AdamW(
            self.adapter.parameters, betas=(0.9, 0.98), weight_decay=0.0, fused=self.device.type == "cuda" or None
        )
        self.step, self.seconds = 0, 0.0
        self.curve: list[dict[str, Any]] = []

    @property
    def state_folder(self) -> Path:
        """Where a run keeps what it needs to continue; not part of the adapter."""
        return self.output / "training"

    @property
    def _state_file(self) -> Path:
        return self.state_folder / "state.pt"

    def begin(self, resume: bool) -> None:
        """Make sure that nothing is overwritten, or resume an earlier run.

        Raises:
            NLDError: the folder holds a run but ``resume`` is False, or there is no run to resume, or its settings
                differ.
        """
        begun = self.state_folder.is_dir() or (self.output / WEIGHTS_FILE).is_file()
        if not resume:
            if begun:
                raise NLDError(
                    f"--output {self.output}: holds an adapter or a run; allowed: --resume, or another folder"
                )
            save(self._state_file, self._state())
            return
        if not self._state_file.is_file():
            raise NLDError(f"--resume: {self.output} holds no run to continue; leave --resume out, or correct --output")
        state = torch.load(self._state_file, map_location=self.device)
        self.settings.check_same(state["settings"])
        for name in self._fingerprints | state["fingerprints"]:
            if state["fingerprints"].get(name) != self._fingerprints.get(name):
                raise NLDError(
                    f"--resume: {name} has changed since the run began; allowed: the same, or another --output"
                )
        with torch.no_grad():
            for matrix, saved in zip(self.adapter.parameters, state["matrices"], strict=True):
                matrix.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.step, self.seconds, self.curve = state["step"], state.get("seconds", 0.0), state["curve"]

    def run(self, schedule: Schedule, progress: Progress) -> bool:
        """Train until the end, or until time runs out; returns whether training is complete."""
        until = time.monotonic() + 60 * schedule.minutes if schedule.minutes else None
        rows, held_out = self._rows(progress)
        if not self.curve:
            self._measure(held_out, progress)
        task = progress.add_task("training", total=self.settings.steps, completed=self.step)
        before = time.monotonic() - self.seconds
        last = self.settings.done(self.step, self.seconds) >= 1
        while not last:
            if until is not None and time.monotonic() > until:
                self._save()
                return False
            figures = self.train_step(rows)
            progress.update(task, advance=1, description=f"training, loss {figures['loss']:.3f}")
            self.seconds = time.monotonic() - before
            last = self.settings.done(self.step, self.seconds) >= 1
            if last or self.step % schedule.measure_every == 0:
                self._measure(held_out, progress)
            if last or self.step % schedule.save_every == 0:
                self._save()
        return True

    def train_step(self, rows: Rows) -> dict[str, float]:
        """Do one step on a batch drawn from ``rows``; returns the values to log.

        These are the loss, in nats per block, and the mean of accepted + 1 over the blocks, before the step.
        """
        settings = self.settings
        chosen = rows[self._turn(len(rows))].trimmed(settings.new_tokens, _ALIGNED)
        starts = self._starts(chosen)
        count, blocks = starts.shape
        before, own = (
            Draws.of(count, blocks, self.block_length, settings.drawn_share, self.generator) for _ in range(2)
        )
        size = settings.micro_batch or settings.batch
        total = torch.zeros(2, device=self.device)
        for part, places, earlier, draws in zip(
            chosen.split(size), torch.split(starts, size), before.split(size), own.split(size), strict=True
        ):
            part, places = part.to(self.device), places.to(self.device)
            target = Target.of(self.model, part.ids, part.begins[:, None], self.eos)
            adapter = self.adapter.rounded(target.hidden.dtype)
            with torch.no_grad():
                cycles, weights = next_cycles(
                    target,
                    places,
                    Drafts.over(self.model, adapter, target, places, self.block_length, earlier.to(self.device)),
                )
            drafts = Drafts.over(self.model, adapter, target, cycles, self.block_length, draws.to(self.device))
            # Divided by the blocks of the whole batch, so that the parts of a batch add up.
            loss = self.objective.loss_sum(self.model, target, drafts, weights) / starts.numel()
            loss.backward()  # type: ignore[no-untyped-call]
            total += torch.stack((loss.detach(), drafts.emitted().sum() / starts.numel()))
        torch.nn.utils.clip_grad_norm_(self.adapter.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate(self.step, self.seconds)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        loss_sum, emitted = total.tolist()  # the only time that a step waits for a GPU, but for what the loss selects
        figures = {"loss": loss_sum, "emitted": emitted}
        with (self.state_folder / "log.jsonl").open("a") as log:
            log.write(json.dumps({"step": self.step, **figures}) + "\n")
        return figures

    def _starts(self, rows: Rows) -> Tensor:
        """Draw where blocks begin, int64 ``[rows, blocks]``: anywhere in a text; after a short one only to fill up."""
        room = self.settings.new_tokens - self.block_length + 1
        after = torch.arange(room) >= rows.lengths(self.eos)[:, None]
        order = (torch.rand(len(rows), room, generator=self.generator) + after).argsort(1)
        return rows.begins[:, None] + order[:, : self.settings.blocks].sort(1).values

    def _turn(self, count: int) -> Tensor:
        """Return the rows of this step, int64 ``[batch]``: every row once per round, in a new order each round."""
        turns = torch.arange(self.settings.batch) + self.step * self.settings.batch
        chosen = torch.empty_like(turns)
        for lap in sorted(set((turns // count).tolist())):
            order = torch.randperm(count, generator=torch.Generator().manual_seed(self.settings.seed + lap))
            chosen[turns // count == lap] = order[turns[turns // count == lap] % count]
        return chosen

    def _rows(self, progress: Progress) -> tuple[Rows, Rows]:
        """Return the text to train on and to measure on.

        The draws depend only on the seed, so that a resumed run repeats them. Measurements always use own text, because
        drafts continue own text when serving.
        """
        settings, corpus = self.settings, self.corpus
        generator = torch.Generator().manual_seed(settings.seed + 1)
        prefix, of_data = settings.prefix_tokens, 0 if settings.own_text else settings.new_tokens
        pieces = corpus.rows(corpus.train, settings.rows, prefix, of_data, self.pad, generator)
        held_out = corpus.rows(corpus.held_out, settings.held_out_rows, prefix, 0, self.pad, generator)
        task = progress.add_task("own text", total=len(held_out) + (len(pieces) if settings.own_text else 0))

        def written(rows: int) -> None:
            progress.advance(task, rows)

        def own(prefixes: Rows, name: str) -> Rows:
            return own_text(self.model, prefixes, settings.new_tokens, self.pad, self.state_folder / name, written)

        measured = own(held_out, "held_out.pt")
        return own(pieces, "own_text.pt") if settings.own_text else pieces, measured

    def _measure(self, held_out: Rows, progress: Progress) -> None:
        task = progress.add_task("measuring", total=len(held_out))
        eos = frozenset(eos_ids(self.model, None))
        found = acceptance.measure(
            self.model, self.adapter.rounded(self.model.diffusion_head.weight.dtype), held_out.to(self.device),
            self.block_length, eos, self.settings.blocks,
            lambda rows: progress.advance(task, rows), self.settings.micro_batch or self.settings.batch,
        )  # fmt: skip
        progress.remove_task(task)
        self.curve.append(
            {
                "step": self.step,
                "acceptance_length": round(found.length, 4),
                "cycles": sum(map(len, found.cycles)),
                "by_position": [round(share, 4) for share in found.by_position],
            }
        )

    def _save(self) -> None:
        save(self._state_file, self._state())
        self.adapter.write(self.output, base_model=str(self.model.config.name_or_path))

    def _state(self) -> dict[str, Any]:
        return {
            "settings": self.settings.model_dump(),
            "fingerprints": self._fingerprints,
            "matrices": [matrix.detach() for matrix in self.adapter.parameters],
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
        }

    @cached_property
    def _fingerprints(self) -> dict[str, str]:
        """Identify the inputs that a resumed run needs unchanged."""
        found = {
            "MODEL": digest(self.model.diffusion_head.weight.float().cpu()),
            "--data": self.corpus.digest(self.corpus.train),
            "the held-out text": self.corpus.digest(self.corpus.held_out),
        }
        return found | ({"--from": self._start} if self._start else {})
