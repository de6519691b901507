"""The thinking budget of a request: where it ends, and what is forced then.

The causal pass forces the tokens that end thinking. Drafts stop before them, and a diffusion block gets them written
into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class ThinkingBudget:
    """A request's ``thinking_token_budget``, and what is known of its text.

    As on vLLM's first runner (``v1/sample/thinking_budget_state.py``), a start within a thinking section opens no other
    one, except in the prompt. Unlike there, all depends on the text alone, and not on the steps that decided it.

    It reads a text once: only the last few tokens are looked at again, because the last one may be replaced, and what
    it begins may go on.

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
        rest, in_prompt = self._settle(prompt, output)
        opened = self._read(rest, len(rest), in_prompt)
        length = len(prompt) + len(output)
        return None if opened < 0 else max(0, self.limit - (length - opened - len(self.start_tokens)))

    def forced(self, prompt: list[int], output: list[int], drafts: Sequence[int]) -> list[int | None]:
        """Return which token must come in the place of each draft, if those before it are accepted, and after them.

        None where any may come.
        """
        left = self.left(prompt, output)
        far = left is None or left > len(drafts)
        if far and not (self.start_tokens and self.start_tokens[-1] in drafts):
            return [None] * (len(drafts) + 1)
        rest, in_prompt = self._settle(prompt, output)
        return [self._forced_after([*rest, *drafts[:count]], in_prompt) for count in range(len(drafts) + 1)]

    def _forced_after(self, rest: list[int], in_prompt: int) -> int | None:
        """Return the token that must come after a text that ends with ``rest``; see :meth:`_read`."""
        opened = self._read(rest, len(rest), in_prompt)
        section = opened + len(self.start_tokens)
        length = self._settled + len(rest)
        if opened < 0 or length - section < self.limit:
            return None
        # What the prompt has of the section is never the end that is forced.
        done = length - max(section + self.limit, self._settled + in_prompt)
        end = self.end_tokens
        return end[done] if 0 < done < len(end) and rest[-done:] == end[:done] else end[0]

    def _settle(self, prompt: list[int], output: list[int]) -> tuple[list[int], int]:
        """Read what is here to stay; return the tokens after it, and how many of them are in the prompt."""
        settled = max(0, len(prompt) + len(output) - max(len(self.start_tokens), len(self.end_tokens)))
        if settled < self._settled:  # tokens were taken back
            self._settled, self._open = 0, -1
        first = self._settled
        rest, in_prompt = [*prompt[first:], *output[max(0, first - len(prompt)) :]], len(prompt) - first
        new = settled - first
        self._open, self._settled = self._read(rest, new, in_prompt), settled
        return rest[new:], in_prompt - new

    def _read(self, rest: list[int], count: int, in_prompt: int) -> int:
        """Return where the section begins that is open after some tokens of a text, or -1.

        Args:
            rest: the tokens after the settled ones.
            count: how many of them to read.
            in_prompt: how many of them are in the prompt, where the last start counts.
        """
        opened, start, end = self._open, self.start_tokens, self.end_tokens
        for place in range(count):
            if rest[place] == end[0] and rest[place : place + len(end)] == end:
                opened = -1
            if rest[place] == start[0] and rest[place : place + len(start)] == start:
                opened = self._settled + place if opened < 0 or place < in_prompt else opened
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

        The budget of that section may end within the drafts, and those after its end would be verified in vain.

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
