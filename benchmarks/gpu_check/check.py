"""What a step gets: the device, the sizes, the record, and a running engine."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_check import record
from gpu_check.plan import Sizes, Step


class Engines:
    """The one engine of a process. A request for another one stops it first."""

    def __init__(self) -> None:
        self._key: Any = None
        self._open = contextlib.ExitStack()
        self._llm: Any = None

    def get(self, key: Any, start: Callable[[], contextlib.AbstractContextManager[Any]]) -> tuple[Any, float]:
        """Return the engine of a key and the seconds that its start took; 0 if it was running."""
        if key == self._key:
            return self._llm, 0.0
        self.stop()
        started = time.perf_counter()
        self._llm = self._open.enter_context(start())
        self._key = key
        return self._llm, time.perf_counter() - started

    def stop(self) -> None:
        """Stop the engine, if one runs."""
        self._key = self._llm = None
        self._open.close()


@dataclass
class Check:
    """One step's view of the run.

    Attributes:
        step: the step.
        device: "cuda", or "cpu" in a dry run.
        sizes: how much to measure.
        folder: folder of the record.
        record: where figures go.
        engines: the process's engine.
        until: ``time.time()`` at which the step is cut.
        scratch: folder for random checkpoints.
    """

    step: Step
    device: str
    sizes: Sizes
    folder: Path
    record: record.Record
    engines: Engines
    until: float
    scratch: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="gpu_check_")))

    @property
    def dry(self) -> bool:
        """Whether this is a dry run on a CPU."""
        return self.device == "cpu"

    @property
    def seconds_left(self) -> float:
        """Seconds until the step is cut."""
        return self.until - time.time()

    def figure(self, name: str, value: Any, unit: str = "", **where: Any) -> None:
        """Print and write one figure; see :meth:`gpu_check.record.Record.figure`."""
        self.record.figure(name, value, unit, **where)

    def earlier(self, step: str, name: str, **where: Any) -> Any:
        """Return a figure of another step, or None."""
        return record.value(self.folder, step, name, **where)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
