"""An option that a selection policy or a draft source brings along. A leaf: it imports nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """One option, under ``nld``.

    Attributes:
        name: the key.
        type: its type, for pydantic.
        default: its default.
        bounds: pydantic's ``ge`` and ``le``.
        description: what it does; shown in the documentation.
    """

    name: str
    type: Any
    default: Any
    bounds: Mapping[str, float]
    description: str
