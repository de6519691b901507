"""The API process's side of the metrics: a Prometheus collector for engines that run this extension's proposer.

It is registered when the engine's first request is admitted. Admission runs in the process that serves ``/metrics``,
and only for NLD engines. A stat-logger plugin, vLLM's own way, would make vLLM keep statistics for every model, even
with ``--disable-log-stats``. The snapshots are read when Prometheus scrapes, so that a scrape after the last request
gets the last values.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import REGISTRY, Collector
from vllm.logger import init_logger

from vllm_nld.serving.metrics import METRICS, find_snapshots, read_samples, remove_snapshots, snapshot_prefix

logger = init_logger("vllm.nld.metrics")

PATIENCE_SECONDS = 60.0
"""Seconds before a warning. A worker publishes when its first step begins, and may be busy until then."""


class SnapshotCollector(Collector):
    """Turns the engines' snapshots into metric families.

    Args:
        model_name: value of the label ``model_name``.
        prefix: start of the snapshots' paths.
    """

    def __init__(self, model_name: str, prefix: Path) -> None:
        self.model_name = model_name
        self.prefix = prefix
        self._may_warn_from = time.monotonic() + PATIENCE_SECONDS

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Yield every metric with a value."""
        found = [
            (engine, sample) for engine, path in find_snapshots(self.prefix).items() for sample in read_samples(path)
        ]
        if not found:
            self._warn()
        for name, metric in METRICS.items():
            family = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            labels = [*metric.labels, "model_name", "engine"]
            made = family(name, metric.help, labels=labels)
            for engine, sample in found:
                if sample.name == name:
                    values = [sample.labels[label] for label in metric.labels]
                    made.add_metric([*values, self.model_name, engine], sample.value)
            if made.samples:
                yield made

    def describe(self) -> list[Any]:
        """Name no metrics in advance, because there may be no values yet."""
        return []

    def _warn(self) -> None:
        if time.monotonic() >= self._may_warn_from:
            self._may_warn_from = float("inf")
            logger.warning("no vllm:nld_* metrics: no file %s* is readable here (worker on another host?)", self.prefix)


def serve_metrics(vllm_config: Any) -> None:
    """Register the collector for an engine with self-speculation; idempotent.

    Args:
        vllm_config: config of an engine that uses this extension's speculation.
    """
    if hasattr(vllm_config, "nld_serves_metrics"):
        return
    vllm_config.nld_serves_metrics = True
    if os.getenv("PROMETHEUS_MULTIPROC_DIR") is not None:
        logger.warning("vllm:nld_* metrics are not served with several API servers (--api-server-count)")
        return
    for collector in [c for c in REGISTRY._collector_to_names if isinstance(c, SnapshotCollector)]:
        REGISTRY.unregister(collector)  # of an earlier engine in this process
    prefix = snapshot_prefix(vllm_config)
    REGISTRY.register(SnapshotCollector(vllm_config.model_config.served_model_name, prefix))
    # vLLM kills its workers at shutdown (--shutdown-timeout is 0), so they cannot remove their own files.
    atexit.register(remove_snapshots, prefix)
