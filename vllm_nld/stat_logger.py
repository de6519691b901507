"""The API process's side of the metrics (entry-point group ``vllm.stat_logger_plugins``).

The snapshots are read when Prometheus scrapes, so that a scrape after the last request sees the last values.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import REGISTRY, Collector
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_nld import MODEL_TYPE
from vllm_nld.metrics import METRICS, read_samples, remove_snapshot, snapshot_path
from vllm_nld.request_options import EngineTraits

logger = init_logger("vllm.nld.metrics")


class SnapshotCollector(Collector):
    """Turns the engines' snapshots into metric families.

    Args:
        model_name: value of the label ``model_name``.
        paths: snapshot files by the value of the label ``engine``.

    Attributes:
        active: engines (values of that label) that have run a step: their snapshots must exist.
    """

    def __init__(self, model_name: str, paths: dict[str, Path]) -> None:
        self.model_name = model_name
        self.paths = paths
        self.active: set[str] = set()
        self._warned: set[str] = set()

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Yield every metric with a value."""
        found = [(engine, sample) for engine, path in self.paths.items() for sample in read_samples(path)]
        for engine in self.active - self._warned - {engine for engine, _ in found}:
            self._warned.add(engine)
            logger.warning(
                "no vllm:nld_* metrics of engine %s: %s is not readable here (worker on another host?)",
                engine,
                self.paths.get(engine),
            )
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
        """Name nothing in advance: there may be no values yet."""
        return []


class NLDStatLogger(AggregateStatLoggerBase):  # type: ignore[misc]
    """Registers the collector for engines that run this extension's proposer; does nothing for others."""

    _collector: SnapshotCollector | None = None

    def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        config = vllm_config.model_config
        if config.hf_config.model_type != MODEL_TYPE or EngineTraits.of(vllm_config).block_length is None:
            return
        if os.getenv("PROMETHEUS_MULTIPROC_DIR") is not None:
            logger.warning("vllm:nld_* metrics are not served with several API servers (--api-server-count)")
            return
        paths = {str(index): snapshot_path(vllm_config, index) for index in engine_indexes}
        for collector in [c for c in REGISTRY._collector_to_names if isinstance(c, SnapshotCollector)]:
            REGISTRY.unregister(collector)  # an engine that was made before in this process
        self._collector = SnapshotCollector(config.served_model_name, paths)
        REGISTRY.register(self._collector)
        for path in paths.values():
            # vLLM kills its workers at shutdown (--shutdown-timeout is 0), so they cannot remove their files.
            atexit.register(remove_snapshot, path)

    def record(self, *args: Any, engine_idx: int = 0, **kwargs: Any) -> None:
        """Note that the engine has run; values are read when they are asked for."""
        if self._collector is not None:
            self._collector.active.add(str(engine_idx))

    def log_engine_initialized(self) -> None:
        """Do nothing."""
