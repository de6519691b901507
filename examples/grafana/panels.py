"""Draw a dashboard's panels from what a Prometheus has, without Grafana: its queries, one small plot each.

python examples/grafana/panels.py --prometheus http://localhost:9090 --minutes 5 --output panels.png
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parent / "nld_dashboard.json"
COLUMNS = 3
Series = tuple[dict[str, str], list[tuple[float, float]]]
"""Labels, and pairs of time (seconds) and value, without those that are no number."""


@dataclass(frozen=True)
class Query:
    """One query of a panel, with Grafana's variables filled in, and the legend of its series."""

    panel: str
    expression: str
    legend: str

    def label(self, labels: dict[str, str]) -> str:
        """Return a series' name, as Grafana would show it."""
        return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: labels.get(match[1], ""), self.legend)


def queries(interval: str, path: Path = DASHBOARD) -> list[Query]:
    """Return a dashboard's queries for all models; ``interval`` stands for Grafana's ``$__rate_interval``."""
    return [
        Query(
            panel["title"],
            target["expr"].replace("$__rate_interval", interval).replace("$model", ".*"),
            target.get("legendFormat", ""),
        )
        for panel in json.loads(path.read_text())["panels"]
        for target in panel["targets"]
    ]


class Prometheus:
    """A running one, at a URL."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def ask(self, path: str, **parameters: Any) -> Any:
        """Return the data of a call of its HTTP API.

        Raises:
            OSError: it does not answer, or not with a result.
        """
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as answer:
            return json.load(answer)["data"]

    def series(self, query: Query, start: float, end: float, step: float) -> list[Series]:
        """Return a query's series from ``start`` to ``end``, seconds, by steps of as many."""
        data = self.ask("query_range", query=query.expression, start=start, end=end, step=step)
        found = ((one["metric"], [(float(t), float(v)) for t, v in one["values"]]) for one in data["result"])
        return [(labels, kept) for labels, values in found if (kept := [(t, v) for t, v in values if v == v])]

    def scrapes(self) -> bool:
        """Whether it has scraped a target that was up."""
        with contextlib.suppress(OSError):
            return any(float(one["value"][1]) == 1 for one in self.ask("query", query="up")["result"])
        return False


def draw(found: list[tuple[Query, list[Series]]], start: float, output: Path) -> None:
    """Draw the series of all queries into one picture, a panel each, over seconds since ``start``."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(query.panel for query, _ in found))
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(5 * COLUMNS, 2.9 * rows), layout="constrained")
    all_axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel().tolist()
    for axes, panel in zip(all_axes, panels, strict=False):
        axes.set_title(panel, fontsize=10)
        axes.set_xlabel("seconds", fontsize=8)
        axes.tick_params(labelsize=8)
        for query, series in found:
            for labels, values in series if query.panel == panel else []:
                axes.plot([t - start for t, _ in values], [v for _, v in values], label=query.label(labels))
        axes.set_ylim(bottom=0)
        if axes.lines:
            axes.legend(fontsize=6, loc="upper left")
    for axes in all_axes[len(panels) :]:
        axes.set_axis_off()
    figure.savefig(output, dpi=80)


def main() -> None:
    """Read the options, ask, draw; exit code 1 if a panel has no data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prometheus", default="http://localhost:9090")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--interval", default="1m", help="what rates are taken over")
    parser.add_argument("--output", type=Path, default=Path("panels.png"))
    options = parser.parse_args()
    end = time.time()
    start, server = end - 60 * options.minutes, Prometheus(options.prometheus)
    found = [(query, server.series(query, start, end, (end - start) / 200)) for query in queries(options.interval)]
    draw(found, start, options.output)
    empty = [f"{query.panel}: {query.expression}" for query, series in found if not series]
    print(f"{options.output}: {len(found) - len(empty)} of {len(found)} queries have data")
    sys.exit("\n".join(["no data:", *empty]) if empty else 0)


if __name__ == "__main__":
    main()
