"""The extension's metrics: their names, how a worker publishes them, and how another process reads them.

vLLM does not send counters of a custom proposer from the worker to the process that serves ``/metrics``. So the worker
writes a small snapshot file, at a path that both derive from the engine's ``instance_id``, and the API process reads it
(:mod:`vllm_nld.serving.collector`).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_nld.draft_sources import SOURCES
from vllm_nld.serving.ledger import Tally

INTERVAL_SECONDS = 0.5
"""Least seconds between two snapshots of a busy worker."""


@dataclass(frozen=True)
class Metric:
    """A metric in Prometheus: its kind (``counter`` or ``gauge``), labels and meaning."""

    kind: str
    labels: tuple[str, ...]
    help: str


METRICS: dict[str, Metric] = {
    "vllm:nld_model_forwards": Metric("counter", ("pass",), "Forwards of the model, by pass: causal or draft."),
    "vllm:nld_request_forwards": Metric(
        "counter",
        ("kind",),
        "Forwards per request; one of n requests counts n times. Kinds: prefill, ar, draft, verify, denoise, commit.",
    ),
    "vllm:nld_tokens": Metric("counter", ("mode",), "Generated tokens, by the mode of the step that decided them."),
    "vllm:nld_blocks": Metric("counter", ("mode",), "Blocks verified (self-speculation) or denoised (diffusion)."),
    "vllm:nld_accepted_tokens": Metric("counter", ("mode",), "Accepted drafts; in diffusion, all that are committed."),
    "vllm:nld_branches": Metric(
        "counter",
        ("kind",),
        "Branches of verify forwards: run, their tokens, and hits by kind (guess, mask), each of which saved a draft.",
    ),
    "vllm:nld_denoising_passes": Metric("counter", (), "Denoising forwards of diffusion blocks, per block."),
    "vllm:nld_decisions": Metric(
        "counter",
        ("mode", "block_length"),
        "What auto mode chose, per request and step: ar (block length 1), or a draft source: "
        f"{', '.join(source.name for source in SOURCES)}.",
    ),
    "vllm:nld_tokens_per_forward": Metric(
        "gauge", ("mode",), "Tokens per decode forward since start-up (draft, verify, denoise and commit all count)."
    ),
    "vllm:nld_acceptance_length": Metric(
        "gauge", (), "1 + accepted / verified blocks of self-speculation since start-up."
    ),
}


@dataclass(frozen=True)
class Sample:
    """One value of a metric."""

    name: str
    labels: dict[str, str]
    value: float


def snapshot_prefix(vllm_config: Any) -> Path:
    """Return the start of the paths of an engine's snapshots. It is equal in the API process and in every worker."""
    # vLLM appends the data-parallel rank to the id in some set-ups.
    engine = vllm_config.instance_id.partition("_dp")[0]
    return Path(tempfile.gettempdir()) / f"vllm-nld-{os.getuid()}-{engine}-"


def snapshot_path(vllm_config: Any) -> Path:
    """Return where this worker publishes: one file per engine and data-parallel rank."""
    # Not data_parallel_rank, which vLLM sets to 0 in every engine of a dense model; it keeps the rank here.
    parallel = vllm_config.parallel_config
    index = getattr(parallel, "data_parallel_index", parallel.data_parallel_rank)
    prefix = snapshot_prefix(vllm_config)
    return prefix.with_name(f"{prefix.name}{index}.json")


def find_snapshots(prefix: Path) -> dict[str, Path]:
    """Return an engine's snapshots by data-parallel rank, which is the label ``engine`` of ``/metrics``."""
    return {path.stem.removeprefix(prefix.name): path for path in sorted(prefix.parent.glob(f"{prefix.name}*.json"))}


class Publisher:
    """Writes snapshots; used by the worker of rank 0.

    Args:
        path: the file; replaced atomically, readable by its owner only, removed when the process ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last = 0.0
        atexit.register(self.remove)

    def publish(self, samples: Callable[[], Sequence[Sample]], now: bool = False) -> None:
        """Write ``samples()``, unless that was done a moment ago and ``now`` is False."""
        moment = time.monotonic()
        if not now and moment - self._last < INTERVAL_SECONDS:
            return
        self._last = moment
        text = json.dumps({"pid": os.getpid(), "samples": [vars(sample) for sample in samples()]})
        # A full disk must not stop the engine; the metrics just get old.
        with contextlib.suppress(OSError):
            # mkstemp follows no link that another user put into the shared folder; mode 0600.
            handle, partial = tempfile.mkstemp(dir=self.path.parent, prefix=f"{self.path.name}.")
            try:
                with os.fdopen(handle, "w") as file:
                    file.write(text)
                Path(partial).replace(self.path)
            except OSError:
                Path(partial).unlink()

    def remove(self) -> None:
        """Delete the file."""
        remove_snapshots(self.path)


def remove_snapshots(prefix: Path) -> None:
    """Delete the snapshots with this prefix, and the temporary files of workers that were killed while writing."""
    for file in prefix.parent.glob(f"{prefix.name}*"):
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


def read_samples(path: Path) -> list[Sample]:
    """Return the samples that a worker last published on this host; empty if there are none."""
    try:
        raw = json.loads(path.read_text())
        return [Sample(**sample) for sample in raw["samples"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def worker_samples(proposer: Any, causal_forwards: int) -> list[Sample]:
    """Return the values of all metrics.

    Args:
        proposer: the worker's :class:`vllm_nld.proposer.SelfSpeculation`.
        causal_forwards: causal passes so far.
    """
    draft_forwards = proposer.draft_pass.forwards if proposer.draft_pass is not None else 0
    return tally_samples(proposer.ledger.total, causal_forwards, draft_forwards, proposer.auto.decisions)


def tally_samples(
    total: Tally, causal_forwards: int, draft_forwards: int, decisions: Mapping[tuple[str, int], int]
) -> list[Sample]:
    """Return the values of all metrics.

    Args:
        total: of all requests.
        causal_forwards: causal passes so far.
        draft_forwards: draft passes so far.
        decisions: of auto mode, by mode and block length.
    """
    samples = [
        Sample("vllm:nld_model_forwards", {"pass": "causal"}, causal_forwards),
        Sample("vllm:nld_model_forwards", {"pass": "draft"}, draft_forwards),
        Sample("vllm:nld_denoising_passes", {}, total.forwards["denoise"]),
    ]
    samples += _by_label("vllm:nld_request_forwards", "kind", total.forwards.items())
    samples += _by_label("vllm:nld_tokens", "mode", total.tokens.items())
    samples += _by_label("vllm:nld_blocks", "mode", total.blocks.items())
    samples += _by_label("vllm:nld_accepted_tokens", "mode", total.accepted.items())
    samples += _by_label("vllm:nld_branches", "kind", total.branches.items())
    samples += [
        Sample("vllm:nld_decisions", {"mode": mode, "block_length": str(length)}, count)
        for (mode, length), count in sorted(decisions.items())
    ]
    rates = [(mode, total.tokens_per_forward(mode)) for mode in total.tokens]
    samples += _by_label("vllm:nld_tokens_per_forward", "mode", [(m, r) for m, r in rates if r is not None])
    length = total.acceptance_length()
    return samples if length is None else [*samples, Sample("vllm:nld_acceptance_length", {}, length)]


def _by_label(name: str, label: str, values: Iterable[tuple[str, float]]) -> list[Sample]:
    return [Sample(name, {label: key}, value) for key, value in values]
