"""Drafts of the model itself: one bidirectional forward over a block of masks (self-speculation)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import ClassVar, Self

from vllm_nld.draft_sources.acceptance import Acceptance, Prior
from vllm_nld.draft_sources.base import ByForward, DraftSource, NewRequest, Text
from vllm_nld.draft_sources.calibration import ChanceClass
from vllm_nld.option import Option
from vllm_nld.origins import DRAFTED

FORGET_SHARE = 0.01
"""What a step without a draft takes off the evidence on a request's acceptance."""
EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
MIDDLES = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.925, 0.97, 0.995)
# Confidence is taken at its word until there is evidence.
CLASSES = tuple(ChanceClass(f"confidence about {middle}", middle, DRAFTED) for middle in MIDDLES)


def chance_classes(confidences: Sequence[float]) -> list[ChanceClass]:
    """Return the classes of drafts of which the model was so sure."""
    return [CLASSES[bisect_right(EDGES, confidence)] for confidence in confidences]  # also if one is NaN


class ModelDrafts(DraftSource):
    """Offers a block of masks, whose worth follows from how many of the request's drafts were accepted so far."""

    name = "self_speculation"
    options: ClassVar[tuple[Option, ...]] = ()  # those of drafting are older than sources: NLDOptions has them
    takes_forward = True

    def __init__(self, prior: Prior) -> None:
        self.acceptance = Acceptance(prior)
        self._idle_steps = 0

    @classmethod
    def open(cls, request: NewRequest) -> Self | None:
        return cls(request.prior)

    def offer(self, text: Text, most: Callable[[], int], after: Sequence[int] = ()) -> ByForward | None:
        drafts = most()
        return ByForward(self.name, self.acceptance, 1 + drafts, self._idle_steps) if drafts >= 1 else None

    def planned(self, taken: bool, steps: int) -> None:
        if taken:
            self._idle_steps = 0
        else:
            self._idle_steps += steps
            self.acceptance.forget(FORGET_SHARE * steps)

    def learn(self, drafts: int, accepted: int) -> None:
        self.acceptance.observe(drafts, accepted)

    def close(self) -> None:
        self.acceptance.prior.note_end(self.acceptance)
