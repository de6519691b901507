"""Speed of light: how few forwards a perfect sampler would need to fill a block (the paper's SOL analysis).

The target of a block is what serial denoising ends with: one position per forward, the surest first. The question is in
how few forwards the very same block can be reached when several positions are committed at once. After each forward
the masked positions whose most probable token is the target's are ordered by confidence, and the longest safe run of
that order is committed ("recursive dynamic compaction"). :class:`Safety` says what is safe. Longest runs are a greedy
choice, and other subsets are not tried, so the result is a lower bound of what is possible.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from vllm_nld.reference.model import KVCache, ReferenceModel


class Safety(StrEnum):
    """When a run may be committed: if the named way of going on still ends in the target.

    Attributes:
        SERIAL: serial denoising, by the model's own choices; no oracle is needed from there on.
        ACCEPTANCE: greedy acceptance, one level down: every position whose prediction is the target's is committed, as
            long as there is one. The paper's definition.
        GREEDY: nothing is asked, all right positions are committed at once: greedy acceptance itself, the cheap bound.
    """

    SERIAL = "serial"
    ACCEPTANCE = "acceptance"
    GREEDY = "greedy"


@dataclass
class OracleBlock:
    """One block's analysis.

    Attributes:
        target: the result of serial denoising, seed first.
        commits: positions committed by each forward of the oracle, in order.
        complete: False if the simulation budget ran out; the rest was then committed serially.
        given: forwards in which no prediction was the target's, so that the surest position was given its token.
    """

    target: list[int]
    commits: list[list[int]] = field(default_factory=list)
    complete: bool = True
    given: int = 0


@dataclass
class SpeedOfLight:
    """The analysis of one prompt, or of several prompts together.

    Attributes:
        tokens: tokens of the filled blocks, seeds included.
        denoising: forwards of the oracle.
        commits: causal forwards, one per block.
        serial: forwards of serial denoising, for comparison.
        simulated: forwards that the analysis itself took.
        blocks: analyzed blocks.
        incomplete: blocks for which the budget ran out.
        given: forwards that committed a token that the model did not predict there, as no prediction was right.
    """

    tokens: int = 0
    denoising: int = 0
    commits: int = 0
    serial: int = 0
    simulated: int = 0
    blocks: int = 0
    incomplete: int = 0
    given: int = 0

    def add(self, other: SpeedOfLight) -> None:
        """Add the counts of another analysis."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def tpf_denoising(self) -> float:
        """Tokens per denoising forward, without commits."""
        return self.tokens / self.denoising if self.denoising else float(self.tokens)

    @property
    def tpf(self) -> float:
        """Tokens per forward, with each block's causal commit."""
        return self.tokens / max(1, self.denoising + self.commits)


@torch.inference_mode()
def analyse(
    model: ReferenceModel,
    prompt_ids: list[int],
    max_new_tokens: int,
    block_length: int,
    budget: int = 5000,
    progress: Callable[[int], None] | None = None,
    safety: Safety = Safety.ACCEPTANCE,
) -> SpeedOfLight:
    """Analyze the blocks of one prompt. The text continues with each block's target.

    Args:
        model: the dense model.
        prompt_ids: the prompt.
        max_new_tokens: tokens to generate.
        block_length: tokens of a block, seed included.
        budget: forwards that the analysis of a block may take, batched probes counted one by one; what would take more
            is not safe.
        progress: called with the number of tokens whenever a block is done.
        safety: what a run must leave possible.
    """
    device = model.diffusion_head.weight.device
    cache, result = KVCache(), SpeedOfLight()
    logits = model.causal(torch.tensor([prompt_ids], device=device), cache)[0, -1]
    while result.tokens < max_new_tokens:
        length = min(block_length, max_new_tokens - result.tokens)
        simulator = _Simulator(model, cache, budget, safety)
        block = simulator.analyse(int(logits.argmax()), length)
        incomplete = 0 if block.complete else 1
        result.add(SpeedOfLight(length, len(block.commits), 1, length - 1, simulator.spent, 1, incomplete, block.given))
        logits = model.causal(torch.tensor([block.target], device=device), cache)[0, -1]
        if progress is not None:
            progress(length)
    return result


class _Simulator:
    """Denoising runs over one cached prefix, with a budget of forwards."""

    def __init__(self, model: ReferenceModel, cache: KVCache, budget: int, safety: Safety) -> None:
        self.model = model
        self.safety = safety
        self.cache = cache
        self.mask_id: int = model.config.mask_token_id
        self.budget = budget
        self.spent = 0

    def analyse(self, seed: int, length: int) -> OracleBlock:
        """Return the analysis of one block."""
        state = [seed] + [self.mask_id] * (length - 1)
        order, target = self._serial(state)
        block = OracleBlock(target)
        while self.mask_id in state:
            if self.spent >= self.budget:
                block.complete = False
                block.commits += [[position] for position in order if state[position] == self.mask_id]
                break
            run, surest = self._longest_safe_run(state, target)
            commit = run or [surest]
            block.given += not run
            block.commits.append(commit)
            for position in commit:
                state[position] = target[position]
        return block

    def _serial(self, state: list[int]) -> tuple[list[int], list[int]]:
        """Return the positions in the order in which serial denoising commits them, and the finished block."""
        tokens = torch.tensor([state])
        order: list[int] = []
        while (tokens == self.mask_id).any():
            best, predicted, _ = self._look(tokens)
            order.append(int(best[0]))
            tokens[0, best[0]] = predicted[0, best[0]]
        return order, [int(token) for token in tokens[0]]

    def _look(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return, for states ``[rows, length]``: surest masked position, most probable tokens, and their confidence."""
        rows = len(states)
        self.spent += rows
        expanded = KVCache(
            [k.expand(rows, -1, -1, -1) for k in self.cache.keys],
            [v.expand(rows, -1, -1, -1) for v in self.cache.values],
        )
        logits = self.model.bidirectional(states.to(self.model.diffusion_head.weight.device), expanded).cpu()
        confidence, predicted = logits.softmax(-1).max(-1)
        confidence = confidence.masked_fill(states != self.mask_id, -1.0)
        return confidence.argmax(1), predicted, confidence

    def _longest_safe_run(self, state: list[int], target: list[int]) -> tuple[list[int], int]:
        """Return the positions to commit now, none where no prediction is the target's; and the surest position."""
        _, predicted, confidence = self._look(torch.tensor([state]))
        right = [
            position
            for position in confidence[0].argsort(descending=True, stable=True).tolist()
            if state[position] == self.mask_id and int(predicted[0, position]) == target[position]
        ]
        surest = int(confidence[0].argmax())
        if self.safety is Safety.GREEDY:
            return right, surest
        # A run of one needs no check: serial denoising would commit it here.
        probes = []
        for count in range(2, len(right) + 1):
            probe = list(state)
            for position in right[:count]:
                probe[position] = target[position]
            probes.append(probe)
        safe = self._reach(torch.tensor(probes), torch.tensor(target)) if probes else []
        longest = max((count for count, reached in enumerate(safe, 2) if reached), default=1)
        return right[:longest], surest

    def _reach(self, probes: Tensor, target: Tensor) -> list[bool]:
        """Return which probes ``[rows, length]`` end in the target when they go on as ``safety`` says.

        A probe is dropped as soon as it cannot; all that are not done are, when the budget is spent.
        """
        alive = torch.ones(len(probes), dtype=torch.bool)
        while True:
            going = (alive & (probes == self.mask_id).any(1)).nonzero().flatten()
            if not len(going):
                return [bool(value) for value in alive]
            if self.spent >= self.budget:
                alive[going] = False
                continue
            best, predicted, _ = self._look(probes[going])
            if self.safety is Safety.SERIAL:
                committed = torch.nn.functional.one_hot(best, probes.shape[1]).bool()
                alive[going] = (predicted == target)[committed]
            else:
                committed = (probes[going] == self.mask_id) & (predicted == target)
                alive[going] = committed.any(1)
            probes[going] = torch.where(committed, predicted, probes[going])
