"""Speed of light: how few forwards a perfect sampler would need to fill a block (the paper's SOL analysis).

The target of a block is what serial denoising ends with: one position per bidirectional forward, the surest first. The
question is in how few forwards the very same block can be reached when several positions are committed at once. After
each forward, the masked positions whose most probable token is the target's are ordered by confidence, and the longest
run of that order is committed from which serial denoising still ends in the target ("recursive dynamic compaction").
Taking the longest run is a greedy choice, and other subsets are not tried, so what is found is a lower bound of the
tokens per forward that are possible.

Everything is deterministic: ties of confidence go to the leftmost position, and no random numbers are drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from vllm_nld.reference.generate import ids_tensor
from vllm_nld.reference.model import KVCache, ReferenceModel

State = tuple[int, ...]
"""Token ids of a block, seed first; the mask token stands for "undecided"."""


@dataclass(frozen=True)
class OracleBlock:
    """One block's analysis.

    Attributes:
        target: token ids that serial denoising ends with, seed first.
        commits: positions (0 is the seed) that each forward of the oracle commits, the surest first.
        complete: False if a longer run could not be tried because the simulation budget was spent.
    """

    target: list[int]
    commits: list[list[int]]
    complete: bool = True


@dataclass
class SpeedOfLight:
    """A prompt's analysis, or that of several prompts together.

    Attributes:
        blocks: the blocks in the order of the text.
        simulated: bidirectional forwards that the analysis itself took, in sequences (a batch of 5 counts 5).
    """

    blocks: list[OracleBlock] = field(default_factory=list)
    simulated: int = 0

    def add(self, other: SpeedOfLight) -> None:
        """Add another analysis."""
        self.blocks += other.blocks
        self.simulated += other.simulated

    @property
    def tokens(self) -> int:
        """Tokens of the filled blocks, seeds included."""
        return sum(len(block.target) for block in self.blocks)

    @property
    def denoising(self) -> int:
        """Bidirectional forwards of the oracle."""
        return sum(len(block.commits) for block in self.blocks)

    @property
    def serial(self) -> int:
        """Bidirectional forwards of serial denoising, for comparison."""
        return sum(len(block.target) - 1 for block in self.blocks)

    @property
    def commits(self) -> int:
        """Causal forwards: one per block, but none for a block that is only its seed, as in block diffusion."""
        return sum(len(block.target) > 1 for block in self.blocks)

    @property
    def incomplete(self) -> int:
        """Blocks for which the simulation budget ran out."""
        return sum(not block.complete for block in self.blocks)

    @property
    def tpf_denoising(self) -> float:
        """Tokens per denoising forward; the causal commits are left out."""
        return self.tokens / max(1, self.denoising)

    @property
    def tpf(self) -> float:
        """Tokens per forward, each block's causal commit counted."""
        return self.tokens / max(1, self.denoising + self.commits)


@torch.inference_mode()
def analyse(
    model: ReferenceModel,
    prompt_ids: list[int],
    max_new_tokens: int,
    block_length: int,
    budget: int = 5000,
    progress: Callable[[int], object] | None = None,
) -> SpeedOfLight:
    """Analyse the blocks of one prompt; the text goes on with each block's target, stop tokens included.

    Args:
        model: the dense model.
        prompt_ids: the prompt's token ids, at least one.
        max_new_tokens: tokens to generate; the last block shrinks to what is left.
        block_length: tokens of a block, seed included; at least 2.
        budget: bidirectional forwards that the analysis may take, in sequences. When they are spent, a run that is not
            known to be safe counts as unsafe; what serial denoising does next is always known and always safe. The
            serial run of every block is made in any case, as the text needs it, so ``simulated`` may exceed the budget.
        progress: called with the number of tokens whenever a block is done.
    """
    cache, result, done = KVCache(), SpeedOfLight(), 0
    logits = model.causal(ids_tensor(model, prompt_ids), cache)[0, -1]
    while done < max_new_tokens:
        length = min(block_length, max_new_tokens - done)
        oracle = Oracle(model, cache, budget - result.simulated)
        block = oracle.analyse(int(logits.argmax()), length)
        result.add(SpeedOfLight([block], oracle.simulated))
        logits = model.causal(ids_tensor(model, block.target), cache)[0, -1]
        done += length
        if progress is not None:
            progress(length)
    return result


class Oracle:
    """The analysis of one block over a cached prefix.

    Every state goes through the model once and the answer is kept. That saves forwards, as runs of denoising meet, and
    it makes serial denoising a function of the state: rounding that depends on the batch cannot turn a run that was
    found safe into an unsafe one.

    Attributes:
        simulated: forwards so far, in sequences.
    """

    def __init__(self, model: ReferenceModel, cache: KVCache, budget: int) -> None:
        self.model = model
        self.cache = cache
        self.budget = budget
        self.simulated = 0
        self._mask_id: int = model.config.mask_token_id
        self._answers: dict[State, tuple[list[int], list[float]]] = {}

    def analyse(self, seed: int, length: int) -> OracleBlock:
        """Return the oracle's way through the block ``[seed, mask, mask, ...]`` of ``length`` tokens."""
        state: State = (seed,) + (self._mask_id,) * (length - 1)
        target = self._serial(state)
        commits: list[list[int]] = []
        complete = True
        while self._mask_id in state:
            run, decided = self._longest_safe_run(state, target)
            commits.append(run)
            complete &= decided
            state = _filled(state, run, target)
        return OracleBlock(list(target), commits, complete)

    def _serial(self, state: State) -> State:
        """Return the finished block that serial denoising makes of ``state``, budget or not."""
        while self._mask_id in state:
            self._look([state])
            position, token = self._next(state)
            state = (*state[:position], token, *state[position + 1 :])
        return state

    def _look(self, states: list[State]) -> None:
        """Run the model on distinct states of one length, as one batch, and keep what it says of each position."""
        if not states:
            return
        rows = len(states)
        self.simulated += rows
        prefix = KVCache(
            [keys.expand(rows, -1, -1, -1) for keys in self.cache.keys],
            [values.expand(rows, -1, -1, -1) for values in self.cache.values],
        )
        ids = torch.tensor(states, device=self.model.diffusion_head.weight.device)
        logits = self.model.bidirectional(ids, prefix)  # float32 [rows, length, vocab]
        tokens = logits.argmax(-1, keepdim=True)
        confidence = logits.softmax(-1).gather(-1, tokens).squeeze(-1)
        for state, answer in zip(
            states, zip(tokens.squeeze(-1).tolist(), confidence.tolist(), strict=True), strict=True
        ):
            self._answers[state] = answer

    def _ordered(self, state: State) -> list[int]:
        """Return the masked positions, the surest first and the leftmost first among equals."""
        _, confidence = self._answers[state]
        masked = [position for position, token in enumerate(state) if token == self._mask_id]
        return sorted(masked, key=lambda position: -confidence[position])

    def _next(self, state: State) -> tuple[int, int]:
        """Return the position and the token that serial denoising commits next."""
        position = self._ordered(state)[0]
        return position, self._answers[state][0][position]

    def _longest_safe_run(self, state: State, target: State) -> tuple[list[int], bool]:
        """Return the positions to commit now, and whether the budget sufficed to find the longest run.

        ``state`` is one from which serial denoising ends in ``target``: so its surest position is right, and committing
        that one alone leads to the next state of the same serial run, which is safe.

        Runs of 2, 3, ... positions are denoised together, one batch per step. One is dropped as soon as it commits a
        wrong token, or as soon as a longer one has reached the target.
        """
        tokens, _ = self._answers[state]
        right = [position for position in self._ordered(state) if tokens[position] == target[position]]
        longest, untried = 1, 1
        probes = {count: _filled(state, right[:count], target) for count in range(len(right), 1, -1)}
        while probes:
            unseen = list(dict.fromkeys(probe for probe in probes.values() if probe not in self._answers))
            unseen = [probe for probe in unseen if self._mask_id in probe]
            self._look(unseen[: max(0, self.budget - self.simulated)])
            going: dict[int, State] = {}
            for count, probe in probes.items():
                if self._mask_id not in probe:
                    longest = max(longest, count)
                elif probe not in self._answers:
                    untried = max(untried, count)
                else:
                    position, token = self._next(probe)
                    if token == target[position]:
                        going[count] = _filled(probe, [position], target)
            probes = {count: probe for count, probe in going.items() if count > longest}
        return right[:longest], untried <= longest


def _filled(state: State, positions: list[int], target: State) -> State:
    """Return ``state`` with the target's tokens at ``positions``."""
    return tuple(target[i] if i in positions else token for i, token in enumerate(state))
