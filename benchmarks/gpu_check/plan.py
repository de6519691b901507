"""The steps, their order, and their time limits."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Step:
    """One part of the check.

    Attributes:
        name: name in the output and in the file.
        module: its module in :mod:`gpu_check.steps`.
        session: consecutive steps of one session share a process, and so a running engine.
        seconds: its time limit.
        start: extra time if it is the first step of its process, for imports and an engine's start.
        shape: the released model whose shape it uses, if it needs one.
    """

    name: str
    module: str
    session: str
    seconds: float
    start: float
    shape: str = ""


STEPS = (
    Step("libraries", "libraries", "operators", 15, 40),
    Step("kernels", "kernels", "tests", 70, 10),
    Step("exactness", "exactness", "exactness", 90, 25),
    Step("engine", "engine", "speculative", 5, 110, "8b"),
    Step("cycle", "cycle", "speculative", 25, 60, "8b"),
    Step("forwards", "forwards", "speculative", 20, 60, "8b"),
    Step("memory", "memory", "speculative", 25, 60, "8b"),
    Step("second", "second", "second", 45, 110, "8b"),
    Step("baseline", "baseline", "plain", 20, 90, "8b"),
    Step("cycle-3b", "cycle", "speculative 3b", 10, 60, "3b"),
    Step("second-3b", "second", "second 3b", 20, 60, "3b"),
    Step("baseline-3b", "baseline", "plain 3b", 10, 60, "3b"),
    Step("times", "times", "times", 45, 20),
    Step("engine-tests", "engine_tests", "engine tests", 60, 20),
)


DRY_PATIENCE = 4.0
"""Factor of the time limits in a dry run, because the limits are for a GPU machine's cores."""


def steps_on(device: str) -> tuple[Step, ...]:
    """Return the steps, with their limits on a device."""
    if device == "cuda":
        return STEPS
    return tuple(replace(s, seconds=s.seconds * DRY_PATIENCE, start=s.start * DRY_PATIENCE) for s in STEPS)


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        rows, lengths, prefixes: points of the kernel time table.
        point_seconds: time spent on one of its points.
        requests: in flight where a cycle is timed; the first count is also the 3B shape's.
        steps: steps or cycles timed for a median.
        prompt_tokens: prompt length of every request.
        drafts: drafts of every block.
        forward_tokens: sizes of the measured forwards.
        crowd: requests of the memory measurement.
        layers: layers of the exactness check's random model.
        new_tokens: tokens per prompt of the exactness check.
        cases: random batches of the operators.
    """

    rows: tuple[int, ...] = (1, 8, 64)
    lengths: tuple[int, ...] = (8, 16, 32)
    prefixes: tuple[int, ...] = (0, 1024, 8192)
    point_seconds: float = 0.4
    requests: tuple[int, ...] = (1, 8, 32)
    steps: int = 40
    prompt_tokens: int = 512
    drafts: int = 31
    forward_tokens: tuple[int, ...] = (1, 16, 32, 64, 128, 256)
    crowd: int = 64
    layers: int = 4
    new_tokens: int = 96
    cases: str = ""


DRY = Sizes(
    rows=(1, 2),
    lengths=(8,),
    prefixes=(0, 64),
    point_seconds=0.02,
    requests=(1, 2),
    steps=4,
    prompt_tokens=40,
    drafts=7,
    forward_tokens=(1, 8),
    crowd=4,
    layers=2,
    new_tokens=12,
    cases="torch and accept",
)
"""Sizes of a dry run: every code path, on a CPU, in a minute."""
