"""Time of our attention and its peers at a model's sizes, and host time of a call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch

from gpu_check.check import Check
from gpu_check.points import FlexPoint, GPUPoint, captured, device_medians, host_seconds, implementations, make_point

FLEX_POINTS = ((1024, 32, 8), (8192, 32, 1))
"""(prefix, block length, rows). Few, because each must be compiled."""


def run(check: Check) -> None:
    """Time every point until time runs short. Long blocks first, because serving uses those."""
    modules, reasons = implementations(check.device)
    for name, reason in reasons.items():
        check.figure("not available", reason, of=name)
    sizes = check.sizes
    points = [(p, n, r) for n, p, r in product(sorted(sizes.lengths, reverse=True), sizes.prefixes, sizes.rows)]
    flex = FLEX_POINTS if not check.dry else tuple(points[-1:])
    reserve = 0.0 if check.dry else 12.0
    with torch.inference_mode():
        for number, point in enumerate(points):
            if check.seconds_left < reserve + 3:
                check.figure("points left out", len(points) - number)
                break
            _measure(check, modules, *point)
        for point in flex:
            if check.seconds_left < 3:
                break
            _measure_flex(check, *point)


def _measure(check: Check, modules: dict[str, Any], prefix: int, length: int, rows: int) -> None:
    point = make_point(check.device, prefix, length, rows)
    where: dict[str, Any] = {"prefix": prefix, "length": length, "rows": rows}
    calls: dict[str, Callable[[], Any]] = {
        name: partial(point.ours, module) for name, module in modules.items() if name != "torch"
    }
    if isinstance(point, GPUPoint):
        calls["flash causal"] = point.floor
    else:
        calls["vllm"] = point.stock
    calls["gather + SDPA"] = point.gather_sdpa
    for name, call in list(calls.items()):
        try:
            call()
            check.synchronize()
        except Exception as error:  # a peer's failure does not affect the others
            check.figure("failed", f"{type(error).__name__}: {error}"[:500], of=name, **where)
            del calls[name]
    timed = calls if check.dry else {name: captured(call) for name, call in calls.items()}
    for name, seconds in device_medians(check.device, timed, check.sizes.point_seconds).items():
        check.figure("attention", seconds * 1e6, "us", of=name, **where)
    if prefix == check.sizes.prefixes[-1] and rows == check.sizes.rows[0]:
        for name, call in calls.items():
            check.figure("host", host_seconds(call, check.synchronize) * 1e6, "us", of=name, **where)


def _measure_flex(check: Check, prefix: int, length: int, rows: int) -> None:
    point = make_point(check.device, prefix, length, rows)
    call = FlexPoint(point, compiled=not check.dry)
    difference = (call().float() - point.gather_sdpa().view_as(point.query).float()).abs().max().item()
    where: dict[str, Any] = {"prefix": prefix, "length": length, "rows": rows}
    check.figure("largest difference from SDPA", difference, of="flex", **where)
    seconds = device_medians(check.device, {"flex": call}, check.sizes.point_seconds)["flex"]
    check.figure("attention", seconds * 1e6, "us", of="flex", **where)
