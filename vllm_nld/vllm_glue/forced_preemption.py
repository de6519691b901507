"""Keeps tokens that vLLM 0.26 loses when all running requests are preempted by force.

``reset_prefix_cache(reset_running_requests=True)`` preempts them while steps are in flight, and the output of these
steps must not count. vLLM 0.26 then drops one output of a request for each *token* that it kept a place for
(``Request.async_tokens_to_discard``). With drafts a step has several places, so the output of later steps is dropped,
too, and its tokens are missing in the text. One output for each step in flight is right. Later versions mark the
output itself as stale.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from typing import Any


class StepsInFlight:
    """Counts, by request, the steps that were planned and whose tokens have not come."""

    def __init__(self) -> None:
        self._steps = deque[list[str]]()

    def planned(self, names: list[str]) -> None:
        """Note a step, with the names of the requests that get tokens from it."""
        self._steps.append(names)

    def came(self) -> None:
        """Note that the output of the oldest step came."""
        self._steps.popleft()

    def correct(self, preempted: Iterable[Any]) -> None:
        """Correct how many outputs are dropped of requests that were preempted by force."""
        waiting = Counter(name for step in self._steps for name in step)
        for request in preempted:
            if hasattr(request, "async_tokens_to_discard"):  # only vLLM 0.26 has it
                request.async_tokens_to_discard = waiting[request.request_id]
