"""Self-speculation with branches: the verify forward already drafts for the places where verification may end.

A branch is ``[guess or MASK, MASK, ...]`` after one token of the block being verified. It sees the prefix, the block up
to that token, and itself, bidirectionally. If verification ends there, with the guessed token (a *hit*; a mask stands
for any token), the next block is drafted already and the cycle costs one forward instead of two. Otherwise a draft
forward follows as usual, or, if misses do not draft, a forward that decides one token and has a mask branch after it,
which is hit for sure. Verify rows do not see branches, and branches do not enter the cache, so the text
stays equal to AR's. A mask branch after every token is the paper's quadratic self-speculation (Appendix C).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vllm_nld.branches.places import RANKS, Branch, Choice, Draft, every_place
from vllm_nld.reference.adapter import DraftAdapter
from vllm_nld.reference.generate import Generation, ThinkingBudget, eos_ids, first_of, ids_tensor, pick
from vllm_nld.reference.model import KVCache, ReferenceModel


@dataclass
class BranchGeneration(Generation):
    """As :class:`Generation`, with what branches did.

    Attributes:
        query_tokens: of every forward but the prefill, branches included.
        hits: of each cycle, ``guess`` or ``mask`` where a branch drafted the next block, else ``none``.
    """

    query_tokens: list[int] = field(default_factory=list)
    hits: list[str] = field(default_factory=list)


def verify(
    model: ReferenceModel, cache: KVCache, block: list[int], branches: list[Branch], rows: list[int]
) -> tuple[Tensor, list[Tensor], int]:
    """Verify a block causally, and draft its branches in the same forward.

    Args:
        cache: the prefix. The block's keys and values are appended, those of branches are not.
        block: tokens, seed first; in a prefill, the prompt.
        branches: which blocks to draft.
        rows: of each branch, how many positions to predict, its seed included.

    Returns:
        Logits ``[len(block), vocab]`` of the next positions, logits ``[rows, vocab]`` of each branch's own positions,
        and the query tokens of the forward.
    """
    past, length, mask_id = cache.length, len(block), model.config.mask_token_id
    ids, positions = list(block), list(range(past, past + length))
    for branch, count in zip(branches, rows, strict=True):
        ids += [mask_id if branch.guess is None else branch.guess] + [mask_id] * (count - 1)
        first = past + branch.after + 1
        positions += range(first, first + count)
    device = model.diffusion_head.weight.device
    sees = torch.zeros(len(ids), past + len(ids), dtype=torch.bool)
    sees[:length, : past + length] = torch.ones(length, past + length, dtype=torch.bool).tril(past)
    starts = [length + sum(rows[:index]) for index in range(len(rows))]
    for branch, start, count in zip(branches, starts, rows, strict=True):
        sees[start : start + count, : past + branch.after + 1] = True
        sees[start : start + count, past + start : past + start + count] = True
    adapter = None if model.draft_adapter is None else AfterRow.of(model.draft_adapter, length)
    hidden = model.hidden(
        ids_tensor(model, ids), torch.tensor(positions, device=device), sees.to(device), cache, True, adapter
    )
    cache.crop(past + length)
    logits = model.logits(hidden)[0]
    return logits[:length], list(torch.split(logits[length:], rows)) if rows else [], len(ids)


class AfterRow(DraftAdapter):
    """A draft adapter that leaves the first rows of a forward alone: those that verify."""

    first: int

    @classmethod
    def of(cls, adapter: DraftAdapter, first: int) -> AfterRow:
        """Return ``adapter`` for rows from ``first`` on."""
        own = cls(adapter.a, adapter.b, adapter.scale, adapter.mask_row, adapter.mask_token_id)
        own.first = first
        return own

    def add(self, layer: int, target: str, x: Tensor, output: Tensor) -> Tensor:
        if x.shape[1] == self.first:
            return output
        changed = super().add(layer, target, x[:, self.first :], output[:, self.first :])
        return torch.cat((output[:, : self.first], changed), dim=1)

    def embed(self, ids: Tensor, embedded: Tensor) -> Tensor:
        changed = super().embed(ids[:, self.first :], embedded[:, self.first :])
        return torch.cat((embedded[:, : self.first], changed), dim=1)


@dataclass
class Speculation:
    """One request on its way.

    Attributes:
        model: what decodes it.
        choose: the branches of each verify forward.
        budget: its thinking budget.
        temperature, generator: of every choice of a token.
        look_past: predict one position more than a block has, so that branches after a wholly accepted block can be
            guessed.
        ar_weight: AR's share of the verifier's logits.
        cache: of all tokens but the last.
        generated: tokens so far; the last one is the next block's seed.
        draft: the block that a branch drafted, if one was hit.
        result: what was counted so far.
    """

    model: ReferenceModel
    choose: Choice
    budget: ThinkingBudget
    temperature: float
    generator: torch.Generator | None
    look_past: bool
    ar_weight: float
    cache: KVCache = field(default_factory=KVCache)
    generated: list[int] = field(default_factory=list)
    draft: Draft | None = None
    result: BranchGeneration = field(default_factory=lambda: BranchGeneration([], nfe=0))

    def make_draft(self, length: int, left: int) -> Draft:
        """Return a block of ``length`` tokens with ``left`` ones left to emit, by a draft forward if it needs one."""
        seed = self.generated[-1]
        if length == 1:
            return Draft([seed], [], [])
        ids = [seed] + [self.model.config.mask_token_id] * (min(length + self.look_past, left) - 1)
        self.result.nfe += 1
        self.result.query_tokens.append(len(ids))
        return self._read(seed, self.model.draft(ids_tensor(self.model, ids), self.cache)[0], length)

    def prefill(self, prompt: list[int], branches: list[Branch], left: int) -> None:
        """Emit the first token, with the branches after the prompt."""
        self._step(prompt, len(prompt) - 1, branches, len(prompt) - 1 + left)

    def cycle(self, block: list[int], branches: list[Branch], left: int) -> None:
        """Verify a block together with its branches."""
        tokens = self._step(block, 0, branches, left)
        self.result.query_tokens.append(tokens)
        self.result.drafts.append(block)

    def _step(self, block: list[int], known: int, branches: list[Branch], left: int) -> int:
        """Verify a block, of which ``known`` tokens after the first are no drafts; return the query tokens."""
        prefix = self.cache.length
        rows = [min(branch.length + self.look_past, left - branch.after - 1) for branch in branches]
        logits, drafted, tokens = verify(self.model, self.cache, block, branches, rows)
        self.result.nfe += 1
        self._mix(logits, branches, drafted)
        emitted: list[int] = []
        for row, token in enumerate(pick(logits[known:], self.temperature, self.generator).tolist(), known + 1):
            forced = self.budget.forces(self.generated + emitted)
            emitted.append(int(self.budget.end_token or 0) if forced else token)
            if row == len(block) or emitted[-1] != block[row]:
                break
        kept = known + len(emitted)
        self.cache.crop(prefix + kept)
        self.generated += emitted
        self._take(kept - 1, branches, drafted)
        if self.result.nfe > 1:  # not of the prompt, which may also be a single token
            self.result.accepted.append(len(emitted))
        return tokens

    def _mix(self, logits: Tensor, branches: list[Branch], drafted: list[Tensor]) -> None:
        """Mix a mask branch's prediction of its first position into the verifier's logits."""
        if self.ar_weight == 1:
            return
        for branch, own in zip(branches, drafted, strict=True):
            if branch.guess is None:
                logits[branch.after] = self.ar_weight * logits[branch.after] + (1 - self.ar_weight) * own[0]
                logits[branch.after, self.model.config.mask_token_id] = -torch.inf  # a share of 0 makes it NaN

    def _take(self, place: int, branches: list[Branch], drafted: list[Tensor]) -> None:
        """Keep the block of the branch that verification ended at, if there is one; a guessed one first."""
        seed, self.draft = self.generated[-1], None
        hits = {branch.guess: i for i, branch in enumerate(branches) if branch.after == place}
        hit = hits.get(seed, hits.get(None))
        if hit is not None:
            self.draft = self._read(seed, drafted[hit], branches[hit].length)
        if self.result.nfe > 1:
            self.result.hits.append("none" if hit is None else "mask" if branches[hit].guess is None else "guess")

    def _read(self, seed: int, logits: Tensor, length: int) -> Draft:
        """Return the block that logits ``[rows, vocab]`` predict, row 0 being the seed's."""
        chances, likely = logits.softmax(-1).topk(min(RANKS, logits.shape[-1]), dim=-1)
        drafted = pick(logits[1:length], self.temperature, self.generator).tolist()
        return Draft([seed, *drafted], likely.tolist(), chances.tolist())


@torch.inference_mode()
def branch_spec_generate(
    model: ReferenceModel,
    prompt_ids: list[int],
    choose: Choice,
    max_new_tokens: int = 128,
    block_length: int | None = None,
    temperature: float = 0.0,
    eos_token_id: int | None = None,
    max_thinking_tokens: int | None = None,
    end_think_token_id: int | None = None,
    generator: torch.Generator | None = None,
    *,
    look_past: bool = True,
    bootstrap: bool = False,
    ar_weight: float = 1.0,
    misses_draft: bool = True,
) -> BranchGeneration:
    """Linear self-speculation with branches. At temperature 0 the text is AR's; above, it has AR's distribution.

    NFE counts the prefill (1), every draft forward and every verify forward. Which branch is used depends on the
    verifier's tokens only, never on how good its drafts look: that would favor some texts.

    Args:
        choose: the branches of each verify forward.
        look_past: predict one position more than a block has, so that branches after a wholly accepted block can be
            guessed.
        bootstrap: draft the first block in the prefill, by a mask branch.
        ar_weight: below 1, where a mask branch follows a token, the verifier's logits are this share of AR's and the
            rest of the branch's: the paper's ensemble. It changes the text.
        misses_draft: run a draft forward where no branch was hit. Else the next forward decides one token and drafts
            after it, in branches that ``choose`` returns for a block without drafts.
    """
    block_length = block_length or model.config.block_size
    eos, budget = eos_ids(model, eos_token_id), ThinkingBudget(max_thinking_tokens, end_think_token_id)
    run = Speculation(model, choose, budget, temperature, generator, look_past, ar_weight)
    left = max_new_tokens - 1
    first = Branch(len(prompt_ids) - 1, None, min(block_length, left))
    run.prefill(prompt_ids, [first] if bootstrap and left > 1 else [], left)
    generated = run.generated
    while generated[-1] not in eos and len(generated) < max_new_tokens:
        left = max_new_tokens - len(generated)
        draft = run.draft or run.make_draft(min(block_length, left) if misses_draft else 1, left)
        before = len(generated)
        run.cycle(draft.tokens, choose(draft, left), left)
        end = first_of(generated[before:], eos)
        if end is not None:
            del generated[before + end + 1 :]
    run.result.ids = prompt_ids + generated
    return run.result


def quadratic_spec_generate(
    model: ReferenceModel,
    prompt_ids: list[int],
    max_new_tokens: int = 128,
    block_length: int | None = None,
    ar_weight: float = 1.0,
    **options: Any,
) -> BranchGeneration:
    """Quadratic self-speculation, as published: one forward a cycle, and one for the prompt with the first block.

    NFE counts the prefill (1) and every cycle (1). ``options`` are those of :func:`branch_spec_generate`.
    """
    length = block_length or model.config.block_size
    return branch_spec_generate(
        model,
        prompt_ids,
        every_place(length),
        max_new_tokens,
        length,
        look_past=False,
        bootstrap=True,
        ar_weight=ar_weight,
        **options,
    )
