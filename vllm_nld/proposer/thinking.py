"""vLLM's thinking budget, seen from the proposer.

vLLM itself forces the end-of-thinking tokens in the causal pass. The proposer needs to know when: a draft must not
reach past that point, and a diffusion block gets the tokens written into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ThinkingBudget:
    """A request's ``thinking_token_budget``.

    Attributes:
        limit: tokens that may follow the start of thinking before its end is forced.
        start_tokens: what opens a thinking section.
        end_tokens: what closes it.
    """

    limit: int
    start_tokens: list[int]
    end_tokens: list[int]

    def left(self, prompt: list[int], output: list[int]) -> int | None:
        """Return how many thinking tokens may still follow ``output``, or None outside a thinking section."""
        if not self.start_tokens or not self.end_tokens:
            return None
        tokens = prompt + output
        start, end = _last(tokens, self.start_tokens), _last(tokens, self.end_tokens)
        if start < 0 or end > start:
            return None
        return max(0, self.limit - (len(tokens) - start - len(self.start_tokens)))

    def before_start(self, text: Any, drafts: list[int]) -> list[int]:
        """Cut drafts before they open a thinking section.

        vLLM counts from the start that is in the text when a step begins. Behind a start among the drafts nothing
        would be forced within the step, where AR may force the end already.

        Args:
            text: int ``[tokens]``, NumPy, prompt and text so far.
            drafts: what is to follow.
        """
        length = len(self.start_tokens)
        tail = text[max(0, len(text) - length + 1) :].tolist()
        for place in range(len(drafts)):
            if (tail + drafts[: place + 1])[-length:] == self.start_tokens:
                return drafts[:place]
        return drafts


def _last(tokens: list[int], wanted: list[int]) -> int:
    """Return where ``wanted`` last begins in ``tokens``, or -1."""
    for start in range(len(tokens) - len(wanted), -1, -1):
        if tokens[start : start + len(wanted)] == wanted:
            return start
    return -1


def thinking_tokens(vllm_config: Any) -> tuple[list[int], list[int]] | None:
    """Return the start and end token ids of vLLM's reasoning config, or None if the engine has none."""
    reasoning = getattr(vllm_config, "reasoning_config", None)
    if reasoning is None or not reasoning.enabled:
        return None
    return list(reasoning.reasoning_start_token_ids), list(reasoning.reasoning_end_token_ids)
