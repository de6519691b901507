"""Branches of requests in self-speculation: planned with a draft, run with its verification, used if one is hit.

Whether a branch is used depends on where verification ended and on the verifier's token there, and on nothing that the
branch drafted, so drafts that are drawn from a branch may be verified like any others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_nld.auto.costs import Costs
from vllm_nld.auto.trials import Trials
from vllm_nld.branches.places import Branch, Choice, Draft, every_place, likeliest_places, usual_length
from vllm_nld.draft_pass.block import Block
from vllm_nld.draft_pass.branch_rows import run_with_blocks
from vllm_nld.draft_pass.forward import DraftPass
from vllm_nld.proposer.causal_step import CausalStep
from vllm_nld.proposer.pending import Pending
from vllm_nld.proposer.request_state import RequestState
from vllm_nld.serving.ledger import Ledger

MOST_BY_PRICE = 8
"""Branches of a request among which ``auto`` chooses."""
TRIED_AGAIN = 2000
"""Steps after which ``auto`` tries branches again where it found that they do not pay, or doing without."""
TRIED_STEPS, TRIED_MARGIN = 64, 1.02
"""Steps of such a trial, and how many times as much branches have to yield. A single request's steps yield 1 to 8
tokens, so short trials are decided by chance: where branches yield 0.95 times as much, trials of 16 steps cost 1.7 %
on average, and these 0.6 % (simulated)."""
LEAST_GAIN = 0.03
"""Share of a cycle's time that branches must save. The maximum of many noisy estimates is biased upward."""


def is_branching(state: RequestState) -> bool:
    """Whether a request's verify forwards branch."""
    return state.options.mode in ("auto", "self_speculation") and state.options.branches != "off"


def waits(state: RequestState) -> bool:
    """Whether a request that no branch was hit for decides one token, and drafts after it in a mask branch.

    That branch is sure to be hit, so no draft forward is run. Auto mode, and branches by price, price draft forwards.
    """
    return state.options.mode == "self_speculation" and state.options.branches not in ("off", "auto")


@cache
def policy(count: int | str, length: int | None, block_length: int) -> Choice:
    """Return the policy for a request's options."""
    own = usual_length(count, length, block_length)
    if count == "all":
        return every_place(own)
    return likeliest_places(MOST_BY_PRICE if count == "auto" else int(count), own)


class Drafted(NamedTuple):
    """A request's next verification.

    Attributes:
        state: the request's.
        block: the filled block that the drafts come from.
        drafts: the tokens to verify after the block's seed.
        left: tokens that the request may still emit.
    """

    state: RequestState
    block: Block
    drafts: list[int]
    left: int


class Branching:
    """Plans, runs and uses the branches of all requests.

    Args:
        longest: tokens of the longest block, seed included.
        ledger: counts them.
        costs: what forwards take here.
        together: makes a choice one for all tensor-parallel ranks, whose measurements differ.

    Attributes:
        tokens: of the branches that the last causal pass ran.
        trials: whether branches by price pay.
    """

    def __init__(
        self, longest: int, ledger: Ledger, costs: Costs, together: Callable[[Callable[[], int]], int]
    ) -> None:
        self._longest, self._ledger, self._costs, self._together = longest, ledger, costs, together
        self.tokens = 0
        self.trials = Trials(again=TRIED_AGAIN, first=False, steps=TRIED_STEPS, margin=TRIED_MARGIN, glimpses=False)
        self._tried: tuple[int, bool] | None = None

    def choose_way(self, drafting: Sequence[RequestState]) -> None:
        """Choose whether a step may have branches by price. If not, its drafts are made as without branches.

        Args:
            drafting: requests with blocks to fill.
        """
        self._tried = None
        if any(is_branching(state) and state.options.branches == "auto" for state in drafting):
            requests = len(drafting)
            self._tried = requests, bool(self._together(lambda: int(self.trials.drafts(requests))))

    def looks_past(self, state: RequestState) -> bool:
        """Whether a request's drafts predict one position more than is verified, for guesses of what follows them.

        The candidates of its positions are looked at, too.
        """
        return self._may_branch(state) and state.options.branches != "all"

    def _may_branch(self, state: RequestState) -> bool:
        by_price = state.options.branches == "auto"
        return is_branching(state) and not (by_price and (self._tried is None or not self._tried[1]))

    def learn(self, tokens: int, comparable: bool) -> None:
        """Learn what a step has yielded.

        Args:
            tokens: that it decided.
            comparable: whether no request was at its prompt.
        """
        requests, branched = self._tried or (0, False)
        self.trials.saw(requests, branched, tokens, comparable and self._tried is not None)
        self._tried = None

    def plan(self, drafted: Sequence[Drafted], tokens: int) -> None:
        """Choose the branches of the next verifications, after :meth:`choose_way`.

        Args:
            drafted: what is to be verified.
            tokens: of the causal pass that does it.
        """
        priced: list[tuple[Pending, int]] = []
        for one in drafted:
            pending = one.state.pending = self._pending(one)
            if pending is not None and one.state.options.branches == "auto":
                priced.append((pending, one.block.length))
        if priced:
            offers = sorted((branch.gain for pending, _ in priced for branch in pending.branches), reverse=True)
            others = sum(one.block.length for one in drafted) - sum(length for _, length in priced)

            count = self._together(lambda: self._worthwhile(priced, offers, tokens, others))
            for pending, _ in priced:
                pending.keep(offers[count - 1] if count else math.inf)

    def _pending(self, one: Drafted) -> Pending | None:
        state, block, drafts, left = one
        if not self._may_branch(state) or drafts != block.tokens[1 : 1 + len(drafts)]:
            return None  # others' drafts took the place of the model's own, so nothing is known of where they end
        options = state.options
        choose = policy(options.branches, options.branch_length, min(options.block_length or self._longest, left))
        rows = [block.candidates.get(place, ([], [])) for place in range(block.length)]
        draft = Draft(block.tokens[: 1 + len(drafts)], [likely for likely, _ in rows], [own for _, own in rows])
        chosen = choose(draft, left)
        return Pending(draft.tokens, block.prefix, chosen, self.looks_past(state), left) if chosen else None

    def _worthwhile(
        self, priced: Sequence[tuple[Pending, int]], offers: Sequence[float], tokens: int, others: int
    ) -> int:
        """Return how many of the best branches together save most time; 0 if none save any.

        A draft forward is saved as a whole only if every request is hit; else it gets shorter.

        Args:
            priced: requests' branches, and the tokens of a block that a hit saves.
            offers: gains of all branches, best first.
            tokens: of the causal pass without them.
            others: tokens of a draft forward for requests that are never hit.
        """
        draft, branched = self._costs.draft.seconds, self._costs.branched.seconds
        drafting = draft(others + sum(length for _, length in priced))
        plain = self._costs.verify.seconds(tokens)
        best, most = 0, LEAST_GAIN * (drafting + plain)
        for count, least in enumerate(offers, 1):
            taken = [[branch for branch in pending.branches if branch.gain >= least] for pending, _ in priced]
            hits = [min(1.0, sum(branch.gain for branch in own)) for own in taken]
            rest = others + sum((1 - hit) * length for hit, (_, length) in zip(hits, priced, strict=True))
            all_hit = 0.0 if others else math.prod(hits)
            saved = drafting - (1 - all_hit) * draft(max(1, round(rest)))
            added = sum(p.rows(branch) for (p, _), own in zip(priced, taken, strict=True) for branch in own)
            gain = saved - (branched(tokens + added) - plain)
            if gain > most:
                best, most = count, gain
        return best

    def run(
        self,
        draft_pass: DraftPass,
        forward: Callable[..., Tensor],
        states: Mapping[int, RequestState],
        step: CausalStep,
        arguments: dict[str, Tensor],
    ) -> Tensor:
        """Run a causal forward, with the branches that were planned for what it verifies.

        Args:
            draft_pass: of the engine.
            forward: vLLM's.
            states: of the step's requests for which branches are planned, by batch row.
            step: the step.
            arguments: of ``forward``: ``input_ids``, ``positions`` and others.
        """
        self.tokens = 0
        due = [(row, state, own) for row, state in states.items() if (own := _due(state, step))]
        if not due:
            return forward(**arguments)
        room = draft_pass.max_tokens - len(arguments["input_ids"])
        blocks, rows, owners = list[Block](), list[int](), list[tuple[Pending, Branch]]()
        for index, (row, state, own) in enumerate(due):
            share = room // (len(due) - index)  # no request takes what others could use
            assert state.pending is not None
            for branch in own:
                block = self._block(draft_pass, state, state.pending, branch)
                if block.length <= share:
                    share, room = share - block.length, room - block.length
                    blocks.append(block)
                    rows.append(row)
                    owners.append((state.pending, branch))
                    self._ledger.branched(state.tally, "run")
                    self._ledger.branched(state.tally, "tokens", block.length)
        self.tokens = sum(block.length for block in blocks)
        if not blocks:
            return forward(**arguments)
        hidden, drafted = run_with_blocks(draft_pass, forward, blocks, rows, **arguments)
        bounds = pairwise(accumulate((block.length for block in blocks), initial=0))
        for (pending, branch), (start, end) in zip(owners, bounds, strict=True):
            pending.hidden[branch] = drafted[start:end]
        return hidden

    def _block(self, draft_pass: DraftPass, state: RequestState, pending: Pending, branch: Branch) -> Block:
        mask = draft_pass.mask_token_id
        seed = mask if branch.guess is None else branch.guess
        tokens = [seed] + [mask] * (pending.rows(branch) - 1)
        return Block(pending.prefix + branch.after + 1, tokens, adapted=state.options.draft_adapter)

    def use(self, draft_pass: DraftPass, states: Mapping[int, RequestState], opened: Mapping[int, Block]) -> None:
        """Fill those of the opened blocks that a branch has drafted.

        A shorter branch shortens its block, and a request that waits keeps the seed only, unless it did so last time:
        then there was no room for its branch.

        Args:
            draft_pass: of the engine.
            states: of all requests of the step, by row. Branches that are not used now never are.
            opened: by row, blocks of self-speculation without drafts.
        """
        filled, hidden = list[Block](), list[Tensor]()
        for row, state in states.items():
            pending, state.pending = state.pending, None
            block = opened.get(row)
            branch = None if pending is None or block is None else pending.hit(block.prefix, block.tokens[0])
            if block is not None and branch is None and waits(state) and (pending is None or len(pending.block) > 1):
                block.shorten(1, 1)
            if pending is None or block is None or branch is None:
                continue
            block.shorten(branch.length, pending.rows(branch))
            filled.append(block)
            hidden.append(pending.hidden[branch][: block.length])
            self._ledger.branched(state.tally, "mask" if branch.guess is None else "guess")
        if filled:
            draft_pass.settle(filled, filled, torch.cat(hidden))
            for block in filled:
                block.passes = 0  # no forward was run for it


def _due(state: RequestState, step: CausalStep) -> list[Branch]:
    """Return the branches of a request that can be run with a step: their block's tokens are verified by it."""
    pending = state.pending
    if pending is None:
        return []
    drafts = step.drafted.get(state.request_id, [])
    as_planned = (
        state.cached.num_computed_tokens == pending.prefix
        and step.scheduled.get(state.request_id) == 1 + len(drafts)
        and drafts == pending.block[1 : 1 + len(drafts)]
    )
    return [branch for branch in pending.branches if branch.after <= len(drafts)] if as_planned else []
