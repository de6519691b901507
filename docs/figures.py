"""Draw the README's picture from the figures of the H100: ``python docs/figures.py`` (needs matplotlib).

A cycle's time and a step of plain vLLM were measured, with random weights. How many tokens a cycle yields depends on
weights and text; two published lengths are shown.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

HERE = Path(__file__).parent
FIGURES = HERE.parent / "benchmarks/results/2026-11-27-h100.json"
PICTURE = HERE / "gain.svg"

PUBLISHED = {"chat-like text, 6.82 tokens a cycle": 6.82, "math and code, 11.98 tokens a cycle": 11.98}
"""Published acceptance lengths of the 8B: SPEED-Bench; the paper's mean of 5.99 tokens a forward, two forwards."""
COLORS = ("#9aa5b1", "#5b9f1f", "#2f6b0a")
SPREAD = 0.27


def measured() -> dict[int, tuple[float, float]]:
    """Return the 8B's cycle and AR step in ms, by the number of requests."""
    table = json.loads(FIGURES.read_text())["tables"][0]
    cycle, step = table["columns"].index("cycle"), table["columns"].index("AR step of plain vLLM")
    return {row[1]: (row[cycle], row[step]) for row in table["rows"] if row[0] == "8B"}


def draw() -> None:
    """Write ``PICTURE``."""
    times = measured()
    plain = [1000 / step for _, step in times.values()]
    series = {"AR, plain vLLM": plain}
    series |= {
        f"self-speculation, {name}": [1000 * n / cycle for cycle, _ in times.values()] for name, n in PUBLISHED.items()
    }
    pyplot.rcParams |= {"svg.hashsalt": "vllm-nld", "font.family": "DejaVu Sans", "font.size": 10}
    figure, axes = pyplot.subplots(figsize=(8, 3.6), facecolor="white")
    for place, (name, speeds) in enumerate(series.items()):
        at = [group + (place - 1) * SPREAD for group in range(len(times))]
        axes.bar(at, speeds, width=SPREAD - 0.03, color=COLORS[place], label=name)
        for x, speed, base in zip(at, speeds, plain, strict=True):
            text = f"{speed:.0f}" if place == 0 else f"{speed:.0f}\n{speed / base:.1f}x"
            axes.text(x, speed + 12, text, ha="center", va="bottom", fontsize=9)
    axes.set_xticks(range(len(times)), [f"{n} request{'s' if n > 1 else ''} at once" for n in times])
    axes.set_ylabel("tokens/s of each request")
    axes.set_ylim(0, 1100)
    axes.set_title("Nemotron-Labs-Diffusion 8B, one H100, bfloat16, blocks of 32", fontsize=11)
    axes.legend(frameon=False, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    draw()
