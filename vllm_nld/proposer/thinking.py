"""vLLM's thinking budget, seen from the proposer.

vLLM itself forces the end-of-thinking tokens in the causal pass. The proposer needs to know when: a draft must not
reach past that point, and a diffusion block gets the tokens written into it.
"""

from __future__ import annotations

from typing import Any


class ThinkingBudget:
    """A request's ``thinking_token_budget``, and what is known of its text.

    As vLLM's first runner counts (``v1/sample/thinking_budget_state.py``), a start within a thinking section opens no
    other one, except in the prompt. It reads a text once: only the last few tokens are looked at again, because the
    last one may be replaced, and what it begins may go on.

    Args:
        limit: tokens that may follow the start of thinking before its end is forced.
        start_tokens: what opens a thinking section.
        end_tokens: what closes it.
    """

    def __init__(self, limit: int, start_tokens: list[int], end_tokens: list[int]) -> None:
        self.limit, self.start_tokens, self.end_tokens = limit, start_tokens, end_tokens
        self._settled, self._open = 0, -1

    def left(self, prompt: list[int], output: list[int]) -> int | None:
        """Return how many thinking tokens may still follow ``output``, or None outside a thinking section."""
        if not self.start_tokens or not self.end_tokens:
            return None
        length = len(prompt) + len(output)
        settled = max(0, length - max(len(self.start_tokens), len(self.end_tokens)))
        if settled < self._settled:  # tokens were taken back
            self._settled, self._open = 0, -1
        first = self._settled
        tokens = [*prompt[first:], *output[max(0, first - len(prompt)) :]]
        in_prompt = len(prompt) - first
        self._open = self._read(self._open, first, tokens, range(settled - first), in_prompt)
        self._settled = settled
        opened = self._read(self._open, first, tokens, range(settled - first, len(tokens)), in_prompt)
        return None if opened < 0 else max(0, self.limit - (length - opened - len(self.start_tokens)))

    def _read(self, opened: int, first: int, tokens: list[int], places: range, prompt: int) -> int:
        """Return where the section begins that is open after some places of a text, or -1.

        Args:
            opened: the same before them.
            first: number of tokens of the text before ``tokens``.
            tokens: the rest of it.
            places: which of ``tokens`` to look at.
            prompt: how many of ``tokens`` are in the prompt; there, the last start counts.
        """
        start, end = self.start_tokens, self.end_tokens
        for place in places:
            if tokens[place] == end[0] and tokens[place : place + len(end)] == end:
                opened = -1
            if tokens[place] == start[0] and tokens[place : place + len(start)] == start:
                opened = first + place if opened < 0 or place < prompt else opened
        return opened

    @property
    def barred(self) -> int | None:
        """The token without which no thinking section opens: what drafts must not be, where they are drawn.

        :meth:`before_start` cuts a draft for what it is. Were it drawn, the text would get fewer such tokens than the
        causal pass gives it: they could only come from the positions where nothing is drafted.
        """
        return self.start_tokens[-1] if self.start_tokens else None

    def before_start(self, text: Any, drafts: list[int]) -> list[int]:
        """Cut drafts before they open a thinking section.

        vLLM counts from the start that is in the text when a step begins. After a start among the drafts nothing
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


def thinking_tokens(vllm_config: Any) -> tuple[list[int], list[int]] | None:
    """Return the start and end token ids of vLLM's reasoning config, or None if the engine has none."""
    reasoning = getattr(vllm_config, "reasoning_config", None)
    if reasoning is None or not reasoning.enabled:
        return None
    return list(reasoning.reasoning_start_token_ids), list(reasoning.reasoning_end_token_ids)
