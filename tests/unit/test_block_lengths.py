"""How long a row's next block is."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from vllm_nld.draft_pass import MAX_GATHERED_TOKENS, DraftPass, DraftRequest
from vllm_nld.proposer import SelfSpeculation, _eos_token_ids, _Requests


def proposer(remaining: int | None = None) -> SelfSpeculation:
    """A proposer without an engine: block length 8, 100 positions, ends at 2 or 3."""
    made: SelfSpeculation = object.__new__(SelfSpeculation)
    made.block_length, made.max_model_len, made.cycles = 8, 100, 0
    made.eos_token_ids = frozenset({2, 3})
    made.draft_pass = None
    made._requests = None
    if remaining is not None:
        made._requests = SimpleNamespace(remaining=lambda row: remaining)  # type: ignore[assignment]
    return made


@pytest.mark.parametrize(
    ("sampled", "decided", "remaining", "length"),
    [
        ([7], 10, None, 8),
        ([7, 8, 9], 10, 50, 8),
        ([], 10, 50, 0),
        ([2], 10, 50, 0),
        ([7, 3, 9], 10, 50, 0),
        ([7], 92, 50, 8),
        ([7], 93, 50, 7),
        ([7], 98, 50, 2),
        ([7], 99, 50, 1),
        ([7], 10, 8, 8),
        ([7], 10, 3, 3),
        ([7], 10, 1, 1),
        ([7], 97, 2, 2),
        ([7], 98, 5, 2),
    ],
)
def test_length(sampled: list[int], decided: int, remaining: int | None, length: int) -> None:
    assert proposer(remaining)._length(0, sampled, decided) == length


def test_propose_drafts_only_where_it_may() -> None:
    made = proposer()
    seen: list[DraftRequest] = []

    def run(requests: list[DraftRequest]) -> list[list[int]]:
        seen.extend(requests)
        return [[50 + request.row] * (request.length - 1) for request in requests]

    made.draft_pass = SimpleNamespace(run=run)  # type: ignore[assignment]
    decided = np.array([10, 20, 97, 99, 30])
    drafts = made.propose([[4, 5], [], [6], [7], [2]], decided, np.zeros((5, 100), dtype=np.int32))
    assert drafts == [[50] * 7, [], [52] * 2, [], []]
    assert seen == [DraftRequest(0, 5, 9, 8), DraftRequest(2, 6, 96, 3)]
    assert made.cycles == 2


def test_propose_without_work_runs_nothing() -> None:
    assert proposer().propose([[], [2]], np.array([5, 6]), np.zeros((2, 100), dtype=np.int32)) == [[], []]


def test_remaining_reads_the_runner() -> None:
    def request(max_tokens: int | None, generated: int, min_tokens: int = 0) -> SimpleNamespace:
        params = SimpleNamespace(max_tokens=max_tokens, min_tokens=min_tokens)
        return SimpleNamespace(sampling_params=params, output_token_ids=[0] * generated)

    runner = SimpleNamespace(
        requests={"a": request(20, 5), "b": request(None, 5), "c": request(20, 5, 8), "d": request(20, 8, 8)},
        input_batch=SimpleNamespace(req_ids=["b", "a", "c", "d"]),
        max_model_len=100,
    )
    requests = _Requests(runner)
    assert requests.remaining(1) == 15
    assert requests.remaining(0) == 100
    assert requests.remaining(2) == 3, "a block ends at min_tokens"
    assert requests.remaining(3) == 12


def test_eos_token_ids() -> None:
    assert _eos_token_ids(SimpleNamespace(eos_token_id=None)) == frozenset()
    assert _eos_token_ids(SimpleNamespace(eos_token_id=11)) == {11}
    assert _eos_token_ids(SimpleNamespace(eos_token_id=[11, 2])) == {11, 2}


def test_groups_have_room_in_a_forward() -> None:
    drafts: DraftPass = object.__new__(DraftPass)
    drafts.max_tokens = 24
    requests = [DraftRequest(row, 0, prefix, 8) for row, prefix in enumerate((500, 10, 30, 20, 40_000, 70_000))]
    assert [[r.row for r in group] for group in drafts._groups(requests)] == [[1, 3, 2], [0], [4], [5]]
    for group in drafts._groups(requests):
        assert len(group) * 8 <= 24
        assert len(group) == 1 or len(group) * (max(r.prefix for r in group) + 8) <= MAX_GATHERED_TOKENS
    assert sorted(r.row for group in drafts._groups(requests) for r in group) == list(range(6))
    assert len(drafts._groups(requests)) < 6
