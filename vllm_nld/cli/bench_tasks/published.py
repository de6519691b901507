"""Published figures by task, to put next to ours: the models' technical report, arXiv 2607.05722."""

from __future__ import annotations

SOURCE = "arXiv 2607.05722, table 10: 8B on SPEED-Bench, draft length 31"
ACCEPTANCE_LENGTH: dict[str, tuple[float, float]] = {
    "coding": (6.61, 8.57),
    "math": (6.24, 8.14),
    "reasoning": (6.18, 7.99),
    "multilingual": (7.96, 10.06),
    "humanities": (5.01, 6.31),
    "qa": (4.01, 4.65),
    "rag": (5.07, 6.15),
    "roleplay": (4.66, 5.54),
    "stem": (5.55, 7.02),
    "summarization": (4.47, 5.48),
    "writing": (4.28, 5.07),
    "all": (5.46, 6.82),
}
"""Category -> acceptance length of linear self-speculation without and with the draft LoRA."""
