"""One picture of a report: agreement against TPF, acceptance by category and position, throughput over concurrency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_nld.cli.bench_tasks.figures import ALL
from vllm_nld.cli.plot import file_pyplot

Rows = list[dict[str, Any]]
DRAFTING = ("self-speculation", "self-speculation, lookup")
"""Ways whose acceptance is shown; the position panel shows the first of them that was measured."""


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the picture.

    Raises:
        NLDError: matplotlib is not installed.
    """
    pyplot = file_pyplot()
    rows: Rows = report["results"]
    lowest = min(row["concurrency"] for row in rows)
    by_category = [row for row in rows if row["concurrency"] == lowest]
    names = list(dict.fromkeys(row["way"] for row in rows))
    colors = {name: f"C{number % 10}" for number, name in enumerate(names)}
    figure, axes = pyplot.subplots(2, 2, figsize=(14, 10.5), layout="constrained")
    _agreement(axes[0, 0], by_category, colors)
    _positions(figure, axes[0, 1], by_category)
    published = report["published"]["acceptance_length_without_and_with_adapter"]
    _lengths(axes[1, 0], by_category, published, colors)
    _throughput(axes[1, 1], rows, colors)
    settings = report["settings"]
    figure.suptitle(
        f"{Path(settings['model']).name}, {settings['dtype']}, greedy, "
        f"at most {settings['prompts']} prompts of each category, {settings['max_tokens']} tokens at most"
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _agreement(axes: Any, rows: Rows, colors: dict[str, str]) -> None:
    """Small dots are categories, large ones all of them; diamonds are accuracy where answers are checked."""
    whole = {row["way"]: row for row in _whole(rows)}
    for name, color in colors.items():
        own = [row for row in rows if row["way"] == name and row["tpf"] is not None]
        axes.scatter([row["tpf"] for row in own], [row["agreement"] for row in own], s=14, color=color, alpha=0.5)
        checked = [row for row in own if row["accuracy"] is not None and row["category"] != ALL]
        axes.scatter(
            [row["tpf"] for row in checked], [row["accuracy"] for row in checked],
            s=50, marker="D", facecolors="none", edgecolors=color,
        )  # fmt: skip
        if name in whole and whole[name]["tpf"] is not None:
            axes.scatter(whole[name]["tpf"], whole[name]["agreement"], s=110, color=color, label=name)
    if any(row["accuracy"] is not None for row in rows):
        axes.scatter([], [], s=50, marker="D", facecolors="none", edgecolors="gray", label="accuracy, checked answers")
    axes.set(xlabel="tokens per forward", ylabel="agreement with AR's text", ylim=(-0.05, 1.08))
    axes.set_title("Agreement against TPF: a small dot per category, a large one for all")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="best")


def _positions(figure: Any, axes: Any, rows: Rows) -> None:
    name = next((way for way in DRAFTING if any(row["way"] == way and row["accepted_by_position"] for row in rows)), "")
    own = [row for row in rows if row["way"] == name and row["accepted_by_position"]]
    axes.set_title(f"Drafts accepted, by position: {name}" if own else "No drafts were verified")
    if not own:
        axes.axis("off")
        return
    most = max(len(row["accepted_by_position"]) for row in own)
    shares = [row["accepted_by_position"] + [0.0] * (most - len(row["accepted_by_position"])) for row in own]
    picture = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            text = f"{share:.2f}".removeprefix("0") if share < 1 else "1"
            axes.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if share < 0.6 else "black")
    axes.set_xticks(range(most), [str(place + 1) for place in range(most)])
    axes.set_yticks(range(len(own)), [row["category"] for row in own])
    axes.set_xlabel("draft")
    figure.colorbar(picture, ax=axes, label="share of the verified blocks")


def _lengths(axes: Any, rows: Rows, published: dict[str, list[float]], colors: dict[str, str]) -> None:
    """Bars are ours; marks are the paper's, of a far larger model."""
    ways = [name for name in DRAFTING if any(row["way"] == name for row in rows)]
    categories = list(dict.fromkeys(row["category"] for row in rows))
    found = {(row["way"], row["category"]): row["acceptance_length"] or 0 for row in rows}
    width = 0.8 / max(1, len(ways))
    for number, name in enumerate(ways):
        places = [place + width * (number - (len(ways) - 1) / 2) for place in range(len(categories))]
        bars = axes.bar(places, [found.get((name, c), 0) for c in categories], width, color=colors[name], label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=6)
    known = [(place, published[name]) for place, name in enumerate(categories) if name in published]
    for index, (label, marker) in enumerate((("without", "v"), ("with", "^"))):
        if known:
            values = [both[index] for _, both in known]
            axes.scatter([place for place, _ in known], values, marker=marker, color="black", s=28,
                         label=f"paper, 8B, {label} draft adapter")  # fmt: skip
    axes.set_xticks(range(len(categories)), categories, rotation=35, ha="right")
    axes.set_ylabel("acceptance length")
    axes.set_title("Acceptance length by category")
    axes.grid(axis="y", alpha=0.3)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.18)  # room for the legend
    axes.legend(fontsize=8, loc="upper right", ncols=2)


def _throughput(axes: Any, rows: Rows, colors: dict[str, str]) -> None:
    whole = _whole(rows)
    for name, color in colors.items():
        own = sorted((row for row in whole if row["way"] == name), key=lambda row: row["concurrency"])
        users, system = [row["tokens_per_s_per_user"] for row in own], [row["tokens_per_s"] for row in own]
        axes.plot(users, system, marker="o", color=color, label=name)
        for row, x, y in zip(own, users, system, strict=True):
            axes.annotate(str(row["concurrency"]), (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set(xlabel="tokens/s of one user", ylabel="tokens/s of the system")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_title("Throughput by requests at once (the numbers)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="best")


def _whole(rows: Rows) -> Rows:
    """Return the row over all categories of each way and concurrency; where there is one category, that one's."""
    groups: dict[tuple[str, int], Rows] = {}
    for row in rows:
        groups.setdefault((row["way"], row["concurrency"]), []).append(row)
    return [next((row for row in group if row["category"] == ALL), group[0]) for group in groups.values()]
