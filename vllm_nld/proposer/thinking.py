"""vLLM's thinking budget, seen from the proposer.

vLLM itself forces the end-of-thinking tokens in the causal pass. The proposer needs to know when: a draft must not
reach past that point, and a diffusion block gets the tokens written into it.
"""

from __future__ import annotations

from typing import Any


class ThinkingBudget:
    """A request's ``thinking_token_budget``, and what is known of its text.

    It reads a text once. Of what was read before, only the last token is looked at again: it may have been replaced.

    Args:
        limit: tokens that may follow the start of thinking before its end is forced.
        start_tokens: what opens a thinking section.
        end_tokens: what closes it.
    """

    def __init__(self, limit: int, start_tokens: list[int], end_tokens: list[int]) -> None:
        self.limit, self.start_tokens, self.end_tokens = limit, start_tokens, end_tokens
        self._read = 0
        self._start = self._end = -1

    def left(self, prompt: list[int], output: list[int]) -> int | None:
        """Return how many thinking tokens may still follow ``output``, or None outside a thinking section."""
        if not self.start_tokens or not self.end_tokens:
            return None
        length = len(prompt) + len(output)
        if length <= self._read:  # tokens were taken back
            self._read, self._start, self._end = 0, -1, -1
        # All but the last token are here to stay.
        self._start = self._last(self.start_tokens, self._start, prompt, output, length - 1)
        self._end = self._last(self.end_tokens, self._end, prompt, output, length - 1)
        self._read = max(0, length - 1)
        start = self._last(self.start_tokens, self._start, prompt, output, length)
        end = self._last(self.end_tokens, self._end, prompt, output, length)
        if start < 0 or end > start:
            return None
        return max(0, self.limit - (length - start - len(self.start_tokens)))

    def _last(self, wanted: list[int], known: int, prompt: list[int], output: list[int], length: int) -> int:
        """Return where ``wanted`` last begins in the first ``length`` tokens, or -1.

        Args:
            wanted: tokens.
            known: the same in what was read before.
            prompt: the text's first tokens.
            output: its others.
            length: how much of the text to read.
        """
        first = max(0, self._read - len(wanted) + 1)
        tokens = [*prompt[first:length], *output[max(0, first - len(prompt)) : max(0, length - len(prompt))]]
        for place in range(len(tokens) - len(wanted), -1, -1):
            if tokens[place] == wanted[0] and tokens[place : place + len(wanted)] == wanted:
                return first + place
        return known

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
