"""Checks that the libraries load, and that a cache write and an attention call of vLLM agree with PyTorch's SDPA."""

from __future__ import annotations

import time

from gpu_check.check import Check

ALLOWED = 0.05
"""Largest difference from SDPA in bfloat16, for outputs of about 1."""


def run(check: Check) -> None:
    """Import, then compare on one batch, for both orders of a page in memory.

    Raises:
        AssertionError: an implementation is wrong.
    """
    started = time.perf_counter()
    import torch

    check.figure("import torch", time.perf_counter() - started, "s")
    started = time.perf_counter()
    import vllm
    from vllm import _custom_ops  # noqa: F401  (registers vLLM's operators)
    from vllm.platforms import current_platform

    check.figure("import vllm", time.perf_counter() - started, "s")
    check.figure("vllm", vllm.__version__)
    check.figure("torch", torch.__version__)
    check.figure("platform", type(current_platform).__name__)
    if check.device == "cuda":
        found = torch.cuda.get_device_properties(0)
        check.figure(
            "gpu", found.name, processors=found.multi_processor_count, capability=f"{found.major}.{found.minor}"
        )
        check.figure("memory", found.total_memory / 2**30, "GiB")
    for heads_first in (False, True) if check.device == "cuda" else (False,):
        _compare(check, heads_first)


def _compare(check: Check, heads_first: bool) -> None:
    import torch
    from attention import DIM

    from gpu_check.points import implementations, make_point

    modules, reasons = implementations(check.device)
    pages = "HND" if heads_first else "NHD"
    point = make_point(check.device, 64 if check.dry else 1000, 16, 3, heads_first=heads_first)
    with torch.inference_mode():
        truth = point.gather_sdpa().float()
        results = {"vllm": point.stock().float()}
        total = point.prefix + point.length
        keys, values = point.layout.gather(point.cache, DIM, point.table.long(), total)
        shape = (point.rows, point.length, -1, DIM)
        for cached, fresh in ((keys, point.key), (values, point.value)):
            assert torch.equal(cached[:, :, point.prefix :], fresh.view(shape).transpose(1, 2)), (
                "the cache write is wrong"
            )
        check.figure("cache write", "exact", pages=pages)
        for name, module in modules.items():
            results[name] = point.ours(module).clone().float()
    differences = {name: (found - truth).abs().max().item() for name, found in results.items()}
    for name, difference in differences.items():
        check.figure("largest difference from SDPA", difference, of=name, pages=pages)
    for name, reason in reasons.items():
        check.figure("not available", reason, of=name)
    wrong = [name for name, difference in differences.items() if not difference <= ALLOWED]
    assert not wrong, f"more than {ALLOWED} from SDPA: {', '.join(wrong)}"
