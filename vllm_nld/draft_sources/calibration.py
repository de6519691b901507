"""How likely a draft is accepted by its kind: how sure the model was of it, or how well a lookup matched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_nld.origins import UNKNOWN

FORGET_OFFERED = 1e-4
"""Share of the evidence on drafts at hand that is lost whenever some are offered."""
GUESS_WEIGHT = 4.0
"""How many drafts a class's guess counts for."""


@dataclass(frozen=True, eq=False, slots=True)
class ChanceClass:
    """A kind of drafts that are about equally likely to be accepted, if those before them are.

    Attributes:
        name: for people.
        guess: how likely, until there is evidence.
        origin: what a report calls those that are accepted (:mod:`vllm_nld.origins`).
    """

    name: str
    guess: float
    origin: str = UNKNOWN


class Calibration:
    """Knows how likely drafts of each class are accepted, from what was observed."""

    def __init__(self) -> None:
        self._evidence: dict[ChanceClass, tuple[float, float]] = {}  # accepted, tested

    def probability(self, chance_class: ChanceClass) -> float:
        """Return the probability that a draft of this class is accepted, given that those before it were."""
        accepted, tested = self._evidence.get(chance_class, (0.0, 0.0))
        return (GUESS_WEIGHT * chance_class.guess + accepted) / (GUESS_WEIGHT + tested)

    def chances(self, classes: Sequence[ChanceClass]) -> list[float]:
        """Return the same for every draft of a block."""
        known = {chance_class: self.probability(chance_class) for chance_class in set(classes)}
        return [known[chance_class] for chance_class in classes]

    def offered(self, classes: Sequence[ChanceClass]) -> None:
        """Decay the evidence on drafts at hand: otherwise a class that once looked bad would never be tried again."""
        for chance_class in set(classes):
            if chance_class in self._evidence:
                accepted, tested = self._evidence[chance_class]
                self._evidence[chance_class] = accepted * (1 - FORGET_OFFERED), tested * (1 - FORGET_OFFERED)

    def observe(self, classes: Sequence[ChanceClass], accepted: int) -> None:
        """Learn from a verified block: its drafts' classes, and how many of them were accepted."""
        for position, chance_class in enumerate(classes[: accepted + 1]):
            yes, all_ = self._evidence.get(chance_class, (0.0, 0.0))
            # Slowly forgetting: traffic changes.
            self._evidence[chance_class] = 0.999 * yes + (position < accepted), 0.999 * all_ + 1
