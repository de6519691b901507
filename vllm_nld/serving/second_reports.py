"""Reports of requests on vLLM's second model runner, made by the scheduler: there it is what knows of every token.

It does not know which of the places that it granted held a draft, nor what diffusion did between two steps. So some
tokens are only known to be the verifier's, and a diffusion request's forwards are not counted. Nor are draft forwards
of requests with branches, which have one only where a step has no room for branches.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any

from vllm_nld.options import NLDOptions
from vllm_nld.origins import AR, BONUS, DENOISED, DRAFTED, SEED, UNKNOWN, VERIFIED, put
from vllm_nld.serving.ledger import Tally
from vllm_nld.serving.report import report


@dataclass
class _Known:
    """A request's origins and counts, whether it wants a report, and whether draft forwards draft for it."""

    wanted: bool
    by_forward: bool
    tally: Tally = field(default_factory=Tally)
    origins: str = ""


class SecondReports:
    """What is known of the requests that want a report.

    Args:
        options: of a request; asked once.
    """

    def __init__(self, options: Callable[[Any], NLDOptions]) -> None:
        self._options = options
        self._known: dict[str, _Known] = {}
        self._fresh: set[str] = set()

    def saw(self, request: Any, mode: str, tokens: int, drafts: int, prefill: bool, cut: bool) -> None:
        """Record the tokens that a step yielded for a request, before the request gets them.

        Args:
            request: vLLM's.
            mode: the request's.
            tokens: how many, at least one.
            drafts: places for drafts that the step verified.
            prefill: whether the step computed its prompt, or part of its text once more.
            cut: whether it had fewer places for drafts than the request asks for.
        """
        name = request.request_id
        known = self._known.get(name)
        if known is None:
            options = self._options(request)
            known = self._known[name] = _Known(options.report, options.branches == "off")
        if not known.wanted:
            return
        self._fresh.add(name)
        known.origins = put(known.origins, request.num_output_tokens, _origins(mode, tokens, drafts, prefill, cut))
        if mode == "diffusion":
            return
        known.tally.forwards["prefill" if prefill else "verify" if drafts else "ar"] += 1
        if drafts:
            known.tally.forwards["draft"] += known.by_forward
            known.tally.blocks["self_speculation"] += 1
            known.tally.accepted["self_speculation"] += tokens - 1

    def take(self, alive: Container[str]) -> dict[str, dict[str, Any]]:
        """Return the reports that have changed, by request, and forget the requests that are over.

        Args:
            alive: ids of the others.
        """
        found = {name: report(self._known[name].origins, self._known[name].tally) for name in self._fresh}
        self._fresh = set()
        for name in [name for name in self._known if name not in alive]:
            del self._known[name]
        return found


def _origins(mode: str, tokens: int, drafts: int, prefill: bool, cut: bool) -> str:
    if mode == "diffusion":
        if prefill:
            return SEED * tokens
        # Where a step had no room for a whole block, its last token may be the block's.
        return DENOISED * (tokens - 1) + (UNKNOWN if cut and tokens > drafts else SEED)
    if not drafts:
        return AR * tokens
    return DRAFTED * (tokens - 1) + (BONUS if tokens > drafts else VERIFIED)
