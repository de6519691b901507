"""What a draft source is, and what it gives and is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from vllm_nld.draft_sources.acceptance import Acceptance, Prior
from vllm_nld.draft_sources.calibration import ChanceClass
from vllm_nld.option import Option

Text = np.ndarray[Any, np.dtype[Any]]
"""int ``[tokens]``: prompt and text so far, a block's seed included."""


@dataclass
class Drafts:
    """Tokens to verify.

    Attributes:
        tokens: in order.
        classes: of each token, how likely drafts of its kind are accepted.
    """

    tokens: list[int]
    classes: list[ChanceClass]

    def keep(self, count: int) -> None:
        """Drop all but the first ``count``."""
        del self.tokens[count:], self.classes[count:]

    def replace(self, start: int, others: Drafts) -> None:
        """Put others in place of as many from ``start`` on; what comes after those stays."""
        end = start + len(others.tokens)
        self.tokens[start:end], self.classes[start:end] = others.tokens, others.classes


@dataclass
class ByForward:
    """Drafts that are not there yet: a draft forward over a block of masks would make them.

    Attributes:
        source: the name of the source that offers them.
        acceptance: what is known of this request's drafts.
        longest: tokens of the longest possible block, seed included; at least 2.
        idle_steps: steps since the request last drafted.
    """

    source: str
    acceptance: Acceptance
    longest: int
    idle_steps: int = 0


@dataclass(frozen=True)
class NewRequest:
    """What a source is told of a request.

    Attributes:
        values: of the source's options.
        prior: what is usual on this server for requests whose drafts are accepted by the same rule.
        knows_prompt: whether the prompt is there as token ids.
        never_drafted: tokens that are no use as drafts, though a prompt may hold them: the mask token, those of images.
    """

    values: Mapping[str, Any]
    prior: Prior
    knows_prompt: bool
    never_drafted: frozenset[int]


class DraftSource(Protocol):
    """Where drafts of one request come from; an instance per request. Text never depends on it, only speed does.

    :meth:`planned`, :meth:`learn` and :meth:`close` do nothing unless a source overrides them.
    """

    name: ClassVar[str]
    """Its label in the metric ``vllm:nld_decisions``."""
    options: ClassVar[Sequence[Option]]
    """What it reads: declared to users under ``nld``, checked at admission, handed to :meth:`open`."""
    takes_forward: ClassVar[bool]
    """Whether its drafts are made by the draft forward: exactly one source says so. The others have theirs at hand."""

    @classmethod
    def open(cls, request: NewRequest) -> Self | None:
        """Return the source for a request in self-speculation or auto mode, or None if it has nothing to say there.

        Called when the request's first drafts are due.
        """

    def offer(self, text: Text, most: Callable[[], int], after: Sequence[int] = ()) -> Drafts | ByForward | None:
        """Return drafts that may follow the text, or None.

        Called in auto mode before a step is planned. For sources with drafts at hand also after a draft forward, in
        auto mode or not, if the forward was not sure of some draft: then ``after`` are the sure drafts before it.

        Args:
            text: what it was the last time, and perhaps more.
            most: how many drafts there is room for; may be less than 1. It takes time, so ask last.
            after: drafts that are to come first.
        """

    def planned(self, taken: bool, steps: int) -> None:
        """Learn whether auto mode takes this source's drafts, in the next step or in none of the next ``steps``.

        Called after a step was planned. Between two plans of steps without a draft forward it is not called.
        """

    def learn(self, drafts: int, accepted: int) -> None:
        """Learn from a causal pass that verified ``drafts`` drafts and accepted the first ``accepted`` of them.

        Called if the block came from this source, even where another one's drafts took the place of its last ones.
        """

    def close(self) -> None:
        """Called when the request is over."""
