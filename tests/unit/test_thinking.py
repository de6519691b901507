"""The thinking budget follows a text as it grows, and reads it once."""

from __future__ import annotations

import random
from typing import Any

import pytest

from vllm_nld.proposer.thinking import ThinkingBudget


def counted_from_scratch(limit: int, start: list[int], end: list[int], prompt: list[int], output: list[int]) -> Any:
    def places(wanted: list[int]) -> list[int]:
        return [i for i in range(len(tokens) - len(wanted) + 1) if tokens[i : i + len(wanted)] == wanted]

    tokens = prompt + output
    ended = max(places(end), default=-1)
    after = [place for place in places(start) if place > ended]
    inside = [place for place in after if place < len(prompt)]
    if not after:
        return None
    opened = inside[-1] if inside else after[0]
    return max(0, limit - (len(tokens) - opened - len(start)))


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
                expected = counted_from_scratch(20, start, end, prompt, output)
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
