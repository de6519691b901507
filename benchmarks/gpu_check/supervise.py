"""Runs every session in its own process, and cuts a step that takes too long."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from gpu_check.plan import Step
from gpu_check.record import Record, read

LEAST_SECONDS = 8.0
"""A step with less time left than this is not started."""
POLL_SECONDS = 0.2


@dataclass
class Supervisor:
    """A run.

    Attributes:
        folder: folder of the record and of every session's output.
        device: "cuda" or "cpu".
        origin: ``time.time()`` at the beginning.
        seconds: limit of the whole run.
        child: command that starts a session's process.
    """

    folder: Path
    device: str
    origin: float
    seconds: float
    child: tuple[str, ...] = (sys.executable, "-m", "gpu_check.child")

    def run(self, steps: Sequence[Step]) -> dict[str, str]:
        """Run the steps; returns the outcome of each."""
        # A dry run has one process for all, because importing vLLM takes most of its time.
        sessions = [(steps[0].session, list(steps))] if self.device == "cpu" else groupby(steps, lambda s: s.session)
        for name, group in sessions:
            left = list(group)
            while left:
                left = self._session(name, left)
        return {step.name: self._state(step) or "skipped" for step in steps}

    def _session(self, name: str, steps: list[Step]) -> list[Step]:
        """Run one process; returns the steps that still need one, because this one ended before they began."""
        if self._seconds_left() < LEAST_SECONDS:
            for step in steps:
                self._record(step).event("skipped", why="no time left")
            return []
        command = [*self.child, *(step.name for step in steps), "--out", str(self.folder)]
        command += ["--device", self.device, "--origin", str(self.origin)]
        log = self.folder / "sessions.log"
        with log.open("ab") as output:
            output.write(f"== {name}\n".encode())
            output.flush()
            # Standard output has the figures; the rest is the output of libraries.
            child = subprocess.Popen(command, stderr=output, start_new_session=True)
        try:
            self._watch(child, steps)
        finally:
            _kill(child)
        begun = [step for step in steps if self._state(step)]
        for step in begun:
            if self._state(step) == "started":
                ended = f"its process ended with status {child.returncode}; see {log.name}"
                self._record(step).event("failed", error=ended)
        if not begun:
            self._record(steps[0]).event("failed", error=f"its process did not start; see {log.name}")
            begun = steps[:1]
        return [step for step in steps if step not in begun]

    def _watch(self, child: subprocess.Popen[bytes], steps: list[Step]) -> None:
        """Wait until the process ends, or one of its steps overruns; the latter is recorded."""
        while child.poll() is None:
            time.sleep(POLL_SECONDS)
            running = [step for step in steps if self._state(step) == "started"]
            if not running and all(self._state(step) for step in steps):
                return  # all done except the engine's shutdown
            step = running[0] if running else next(step for step in steps if not self._state(step))
            allowed = step.seconds + step.start * (step is steps[0])
            over = bool(running) and time.time() - self.origin - self._began(step) > allowed
            if over or self._seconds_left() <= 0:
                why = f"{allowed:.0f} s for the step" if over else f"{self.seconds:.0f} s for the whole"
                self._record(step).event("cut", why=f"over the limit of {why}")
                return

    def _record(self, step: Step) -> Record:
        return Record(self.folder, step.name, self.origin)

    def _events(self, step: Step) -> list[dict[str, object]]:
        return [line for line in read(self.folder) if line["step"] == step.name and "event" in line]

    def _state(self, step: Step) -> str | None:
        events = self._events(step)
        return str(events[-1]["event"]) if events else None

    def _began(self, step: Step) -> float:
        return float(str(self._events(step)[0]["at"]))

    def _seconds_left(self) -> float:
        return self.seconds - (time.time() - self.origin)


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End the process and all processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
