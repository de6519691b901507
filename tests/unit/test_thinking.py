"""The thinking budget follows a text as it grows, and reads it once; vLLM forces each request's end in its own row."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.sample.sampler import Sampler
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

from tests.unit.test_greedy_verify import greedy
from vllm_nld.proposer.thinking import ThinkingBudget
from vllm_nld.vllm_glue.rejection_sampler import decide_after_drafts


def counted_from_scratch(limit: int, start: list[int], end: list[int], tokens: list[int]) -> int | None:
    def last(wanted: list[int]) -> int:
        found = [i for i in range(len(tokens) - len(wanted) + 1) if tokens[i : i + len(wanted)] == wanted]
        return found[-1] if found else -1

    if last(start) < 0 or last(end) > last(start):
        return None
    return max(0, limit - (len(tokens) - last(start) - len(start)))


@pytest.mark.parametrize(("start", "end"), [([1], [2]), ([1, 1], [2]), ([1, 2], [2, 1, 1])])
def test_incremental_reading_equals_whole_reading(start: list[int], end: list[int]) -> None:
    """Tokens come one by one and in blocks, the last one is sometimes replaced, and some are removed."""
    generator = random.Random(0)

    def some(most: int) -> list[int]:
        return [generator.randint(1, 4) for _ in range(generator.randint(0, most))]

    inside = 0
    for _ in range(100):
        budget, prompt, output = ThinkingBudget(20, start, end), some(12), list[int]()
        for _ in range(25):
            if generator.random() < 0.1:
                del output[generator.randint(0, len(output)) :]
            else:
                output += some(5)
            for _ in range(generator.randint(1, 2)):
                expected = counted_from_scratch(20, start, end, prompt + output)
                assert budget.left(prompt, output) == expected
                inside += expected is not None
            if output and generator.random() < 0.3:
                output[-1] = generator.randint(1, 4)
    assert inside > 100


class Watched(list[int]):
    """Counts the tokens that are read."""

    read = 0

    def __getitem__(self, which: Any) -> Any:
        found = super().__getitem__(which)
        self.read += len(found) if isinstance(which, slice) else 1
        return found

    def __add__(self, other: Any) -> Any:
        self.read += len(self)
        return super().__add__(other)


def test_only_new_tokens_are_read() -> None:
    prompt, output = Watched([5] * 5000), Watched([1, 6])
    budget = ThinkingBudget(400, [1, 6], [2, 6])
    assert budget.left(prompt, output) == 400
    prompt.read = output.read = 0
    for step in range(1, 200):
        output += [7]
        assert budget.left(prompt, output) == 400 - step
    assert prompt.read + output.read < 200 * 20


def test_ends_are_forced_in_their_own_rows_in_steps_without_drafts() -> None:
    """As vLLM before 0.32 samples them: an engine with drafts, but the plain sampler, which hears of no drafts."""
    start, end, budgets = 1, 2, [9, 4, 6]
    tokens = {"reasoning_start_token_ids": [start], "reasoning_end_token_ids": [end]}
    most_drafts = 3
    holder = ThinkingBudgetStateHolder(SimpleNamespace(**tokens), len(budgets), most_drafts, torch.device("cpu"), False)
    texts: list[list[int]] = [[] for _ in budgets]
    added = [
        (row, SamplingParams(thinking_token_budget=limit), [5, start], texts[row]) for row, limit in enumerate(budgets)
    ]
    holder.sync_batch(BatchUpdate(batch_size=len(budgets), removed=[], added=added, moved=[]))
    sampler = Sampler()
    for _ in range(2):  # as when vLLM lowers the length limit
        decide_after_drafts(sampler)
    none: list[list[int]] = [[] for _ in budgets]
    settings = {"output_token_ids": texts, "spec_token_ids": none, "thinking_budget_state_holder": holder}
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        logits = torch.randn(len(budgets), 40, generator=generator).index_fill_(1, torch.tensor([start, end]), -9.0)
        output = sampler(logits=logits, sampling_metadata=greedy(len(budgets), **settings))
        for text, (token,) in zip(texts, output.sampled_token_ids.tolist(), strict=True):
            text.append(token)
    assert [[place for place, token in enumerate(text) if token == end] for text in texts] == [[9], [4], [6]]
