"""The kernels of branches in Triton's interpreter, without an engine: the policy, hits, and what sampling keeps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.chi_square import chi_square_p_value
from tests.support.interpreted import INTERPRETING
from tests.support.second_runner import complete_interpreter
from vllm_nld.branches.places import Branch, Draft, every_place, likeliest_places

if INTERPRETING:
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

    from vllm_nld.branches.places import BY_RANK, MASK_WORTH
    from vllm_nld.speculator import branch_kernels as kernels
    from vllm_nld.speculator.buffers import OWN_STREAM
    from vllm_nld.vllm_glue import second_runner

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="its tensors are on the CPU")

VOCAB, FEW, LONGEST = 8, 4, 400


def ints(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32)


class Requests:
    """Requests that branch, and what the kernels keep of them; each is in the row of its number."""

    def __init__(self, number: int, slot_length: int, count: int, prefix: int, looks: bool = True) -> None:
        self.number, self.length, self.count = number, slot_length, count
        self.ids, self.looks = torch.arange(number), ints([int(looks)] * number)
        self.counts, self.lengths = ints([count] * number), ints([slot_length - looks] * number)
        self.seq_lens, self.rejected = ints([prefix] * number), ints([0] * number)
        self.last = torch.zeros(number, 1, dtype=torch.int64)
        self.block_lens, self.valid = ints([slot_length - looks] * number), ints([0] * number)
        self.planned_prefix, self.counters = ints([-1] * number), torch.zeros(4, dtype=torch.int64)
        self.places, self.guesses = ints([[0] * 8] * number), ints([[-2] * 8] * number)
        self.drafts = torch.zeros(number, slot_length, dtype=torch.int64)

    def plan(self, tokens: Tensor, likely: Tensor, chances: Tensor, most: int | None = None) -> None:
        kernels.plan_kernel[(self.number,)](
            ints(self.ids), self.ids, self.seq_lens, self.rejected, self.last, self.block_lens,
            tokens, likely, chances, self.counts, self.looks, self.drafts, self.drafts.stride(0),
            self.planned_prefix, self.places, self.guesses, 8,
            self.length, most or self.count, LONGEST, MASK_WORTH, *BY_RANK,
            PLACES=16, COLUMNS=8, RANKS=likely.shape[-1], STEPS=16,
        )  # fmt: skip

    def hits(self, live: Tensor, num_sampled: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return where each draft comes from, whose noise it is drawn by, and whose it is."""
        found = torch.full((3, self.number * (self.length - 1)), -7)
        kernels.hit_kernel[(self.number,)](
            ints(self.ids), ints(self.ids), self.ids, self.seq_lens, self.rejected, num_sampled, self.last,
            self.places, self.guesses, 8, live, self.lengths, kinds,
            found[0], found[2], found[1], self.block_lens, self.valid, self.counters,
            self.count, self.length, LONGEST, -1, OWN_STREAM, LENGTH=16,
        )  # fmt: skip
        return found[0], found[1], found[2]

    def branches(self, request: int) -> list[tuple[int, int | None]]:
        guesses, places = self.guesses[request].tolist(), self.places[request].tolist()
        return [
            (place, None if guess == kernels.MASK else guess)
            for place, guess in zip(places, guesses, strict=True)
            if guess != kernels.IDLE
        ]


def places_of(branches: list[Branch]) -> list[tuple[int, int | None]]:
    return [(branch.after, branch.guess) for branch in branches]


@pytest.mark.parametrize("count", [1, 8])
def test_plans_are_the_policy_s(count: int) -> None:
    """Drawn drafts, which may be any candidate or none; some blocks are shorter, and some look past themselves."""
    complete_interpreter()
    generator = torch.Generator().manual_seed(count)
    rows = Requests(12, 6, count, prefix=20)
    logits = torch.randn(12, 5, VOCAB, generator=generator) * 3
    chances, likely = logits.softmax(-1).topk(4)
    tokens = torch.randint(0, VOCAB, (12, 5), generator=generator)
    tokens[::3] = likely[::3, :, 0]
    rows.block_lens = ints([1, 2, 4, 5, 5, 5] * 2)
    rows.looks = ints([1] * 6 + [0] * 6)
    rows.last = torch.arange(12)[:, None]
    rows.plan(tokens.flatten(), likely.flatten(0, 1), chances.flatten(0, 1))
    for request in range(12):
        own = int(rows.block_lens[request]) - 1
        past = own + int(rows.looks[request]) if own else 0
        draft = Draft(
            [request, *tokens[request, :own].tolist()],
            [[], *likely[request, :past].tolist()],
            [[], *chances[request, :past].tolist()],
        )
        assert rows.branches(request) == places_of(likeliest_places(count, 5)(draft, 99)), request
        filled = [request] * (rows.length - own)
        assert rows.drafts[request].tolist() == [*tokens[request, :own].tolist(), *filled]
    rows.counts.fill_(kernels.ALL)
    rows.plan(tokens.flatten(), likely.flatten(0, 1), chances.flatten(0, 1), most=8)
    for request in range(12):
        draft = Draft([request] * int(rows.block_lens[request]), [], [])
        assert rows.branches(request) == places_of(every_place(5)(draft, 99))


def test_guesses_go_before_masks_and_idle_branches_are_not_hit() -> None:
    complete_interpreter()
    rows = Requests(6, 4, 3, prefix=30)
    rows.places[:, :3] = ints([1, 1, 2])
    rows.guesses[:, :3] = ints([kernels.MASK, 7, 6])
    rows.last = torch.tensor([7, 3, 6, 7, 7, 7])[:, None]
    live = ints([[1, 1, 1]] * 4 + [[1, 0, 1], [0, 0, 0]]).flatten()
    kinds = ints([0, 1, 0, 0, 1, 0])
    sources, positions, whose = rows.hits(live, ints([2, 2, 3, 1, 2, 2]), kinds)
    assert rows.valid.tolist() == [2, 2, 2, 0, 2, 0]
    assert rows.counters.tolist() == [0, 0, 2, 2]
    first = [sources[3 * row].item() for row in (0, 1, 2, 4)]
    assert first == [1 * 4 + 1, 3 * 4 + 1, 8 * 4 + 1, 12 * 4 + 1]
    assert whose.view(6, 3)[:, :2].tolist() == [[0, 0], [1, 1], [2, 2], [-1, -1], [4, 4], [-1, -1]]
    assert positions.view(6, 3)[1].tolist() == [30, 31, 32]  # the verifier's own noise
    other = rows.hits(live, ints([2] * 6), kinds)[1].view(6, 3)[0]
    rows.seq_lens += 1
    later = rows.hits(live, ints([2] * 6), kinds)[1].view(6, 3)[0]
    assert (other - OWN_STREAM) % (1 << 24) == pytest.approx(torch.tensor([30, 31, 32]))
    assert set(other[1:].tolist()).isdisjoint(later[:-1].tolist()), "one position, two blocks: two streams"


@pytest.fixture(scope="module")
def cycles() -> SimpleNamespace:
    """A block of two drafts of many requests, verified, and what the branches that were hit have drafted.

    The verifier's distribution of a position is the same after any text, so what the next cycle decides first must have
    it, whatever was hit before. There is a guess after the seed, and a mask after the first draft.
    """
    complete_interpreter()
    number, prefix, length = 160, 40, 4
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(LONGEST, FEW, generator=generator) * 1.2
    by_block, by_guess, by_mask = (-target[:3] + torch.randn(3, 3, FEW, generator=generator)).unbind(0)
    rows = Requests(number, length, 2, prefix)
    seeds = torch.randint(-(2**62), 2**62, (number,), generator=generator)
    ones = torch.ones(number)

    def draw(told: Tensor, positions: Tensor, own: Tensor) -> Tensor:
        """Return two drafts of each of these requests."""
        told, positions = told[own, :2].flatten(0, 1), positions.view(number, -1)[own, :2].flatten()
        whose = own.repeat_interleave(2)
        drawn = second_runner.draw(told, whose, ones, seeds, positions, tempered=False, fp64=False)
        return drawn.view(len(own), 2)

    def verify(drafts: Tensor, told: Tensor, first: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Return these requests' tokens, and how many they are."""
        places = (first[own, None] + torch.arange(3)).flatten()
        tokens, counts = rejection_sample(
            target[places],
            told[:, :2].contiguous(),
            torch.cat((torch.zeros(len(own), 1, dtype=torch.int64), drafts), 1).flatten().int(),
            ints(torch.arange(len(own) + 1) * 3),
            places,
            own,
            own.repeat_interleave(3),
            ints([0, 1, 2] * len(own)),
            ones,
            seeds,
            2,
        )
        return tokens, counts

    told = by_block.repeat(number, 1, 1)
    stream = OWN_STREAM + ((prefix % kernels.STREAMS) << 24)
    drafts = draw(told, (prefix + stream + torch.arange(3)).repeat(number), rows.ids)
    rows.places[:, :2], rows.guesses[:, :2] = ints([0, 1]), ints([int(target[prefix].argmax()), kernels.MASK])
    tokens, counts = verify(drafts, told, rows.seq_lens.long(), rows.ids)
    rows.seq_lens = rows.seq_lens + counts.int()
    rows.last = tokens.gather(1, counts.long()[:, None] - 1)
    sources, positions, _ = rows.hits(ints([1] * 2 * number), counts.int(), ints([0] * number))
    is_mask = sources.view(number, 3)[:, 0] // length % 2 == 1
    told = torch.where(is_mask[:, None, None], by_mask, by_guess)
    hit = rows.ids[rows.valid > 0]  # the others draft nothing, and their tokens are of no interest
    return SimpleNamespace(
        rows=rows, target=target, told=told, hit=hit, drafts=draw(told, positions, hit), verify=verify,
        is_mask=is_mask[hit],
    )  # fmt: skip


@pytest.mark.parametrize("biased", [False, True])
def test_sampled_tokens_have_the_verifier_s_distribution(cycles: SimpleNamespace, biased: bool) -> None:
    """By vLLM's rejection sampler, after hits of both kinds; the likeliest draft for the drawn one must be noticed."""
    seq_lens, drafts = cycles.rows.seq_lens, cycles.drafts.clone()
    if biased:
        drafts[:, 0] = cycles.told[cycles.hit, 0].argmax(-1)
    tokens, counts = cycles.verify(drafts, cycles.told, seq_lens.long(), cycles.hit)
    assert (counts > 1).sum() > 20
    values = []
    for own in (~cycles.is_mask, cycles.is_mask):
        place = seq_lens[cycles.hit][own].unique()
        assert len(place) == 1 and own.sum() > 25, own.sum()
        expected = cycles.target[place[0]].double().softmax(-1) * own.sum()
        values.append(chi_square_p_value(tokens[own, 0].bincount(minlength=FEW), expected))
    assert min(values) < 1e-4 if biased else min(values) > 1e-2, values


def test_candidates_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests may ask for branches that the profiling run did not see."""
    from vllm_nld.speculator import branching

    logits = torch.randn(7, VOCAB, dtype=torch.bfloat16)
    whole, copied, original = branching.candidates(logits), list[int](), Tensor.float
    monkeypatch.setattr(branching, "CHUNK_BYTES", 2 * 4 * VOCAB)
    monkeypatch.setattr(Tensor, "float", lambda own: copied.append(len(own)) or original(own))
    found = branching.candidates(logits)
    assert copied == [2, 2, 2, 1]
    assert all(one.equal(other) for one, other in zip(found, whole, strict=True))
