"""``--gpu here``: this machine's rates, measured by a few seconds of matrix products."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from vllm_nld.errors import NLDError
from vllm_nld.planning.gpus import GPUS, HERE, Gpu

MEASURED = ("bfloat16", "float16", "float32")

ROWS = 512
"""Rows of the product that is limited by arithmetic."""
SHAPE, MATRICES = (18432, 3072), 8
"""Shape of a weight, and how many such weights take turns: 0.9 GB in bfloat16, so that no cache holds one."""
BUDGET = 2.0
"""Seconds for each of the three measurements."""
CPU_HOST_SECONDS = 1e-3
"""Seconds of an engine step outside its forward on a CPU. Not measured here, because that needs an engine."""


def calibrate(dtype: str) -> Gpu:
    """Measure this machine: memory bandwidth by products with one row, FLOP/s with many rows, and a kernel's start.

    On a CPU the products are vLLM's, if it is installed, since the model will run those. All cores that PyTorch uses
    take part. Links between devices are not measured.

    Args:
        dtype: type of the weights; rates of other types are not measured.

    Raises:
        NLDError: products of this type cannot be measured.
    """
    import torch

    if dtype not in MEASURED:
        raise NLDError(f"--dtype {dtype}: --gpu {HERE} measures {', '.join(MEASURED)}")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"plan: measuring this machine ({device}) ...", file=sys.stderr)
    with torch.inference_mode():
        bandwidth, flops = _rates(torch, device, dtype)
        kernel = _kernel_seconds(torch, device)
    gpu = device == "cuda"
    return Gpu(
        name=HERE,
        memory=torch.cuda.get_device_properties(0).total_memory if gpu else _main_memory(),
        bandwidth=bandwidth,
        flops={dtype: flops},
        bandwidth_share=1.0,  # these rates are measured, not stated by the maker
        flops_share=1.0,
        kernel_seconds=3e-6 if gpu else kernel,  # CUDA graphs start kernels without the host
        host_seconds=0.5e-3 if gpu else CPU_HOST_SECONDS,
        reserved=2e9 if gpu else 0.0,
    )


def _rates(torch: Any, device: str, dtype: str) -> tuple[float, float]:
    """Return bytes/s of reading weights and FLOP/s of a large product, for one type."""
    out, inner = SHAPE
    kind = getattr(torch, dtype)
    products = []
    for _ in range(MATRICES):
        layer = torch.nn.Linear(inner, out, bias=False, dtype=kind, device=device)
        products.append(_vllm_product(layer) if device == "cpu" else layer)
    row, rows = (torch.randn(n, inner, dtype=kind, device=device) for n in (1, ROWS))

    def all_with(rows: Any) -> None:
        for product in products:
            product(rows)

    weights = MATRICES * out * inner
    read = _median_seconds(lambda: all_with(row), device)
    return weights * row.element_size() / read, 2 * ROWS * weights / _median_seconds(lambda: all_with(rows), device)


def _vllm_product(layer: Any) -> Callable[[Any], Any]:
    """Return vLLM's product with the layer's weights, or PyTorch's if vLLM has none."""
    import torch

    try:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
        weight, product = layer.weight, layer.cpu_linear
        product(torch.zeros(1, layer.in_features, dtype=weight.dtype), weight, None)
    except (ImportError, AttributeError, RuntimeError, NotImplementedError):
        return layer  # type: ignore[no-any-return]
    return lambda rows: product(rows, weight, None)


def _kernel_seconds(torch: Any, device: str) -> float:
    """Return the seconds of an operator with next to nothing to do."""
    layer = torch.nn.Linear(64, 64, bias=False, device=device)
    row = torch.zeros(1, 64, device=device)

    def chain() -> Any:
        out = row
        for _ in range(100):
            out = layer(out)
        return out

    return _median_seconds(chain, device) / 100


def _median_seconds(call: Callable[[], Any], device: str) -> float:
    """Return the seconds of a call: the median of at least five, over ``BUDGET`` seconds, after one warm-up call.

    The median, because benchmarks of the engine also state it. On a shared machine the fastest call is rare.
    """
    import torch

    call()
    times, started = list[float](), time.perf_counter()
    while len(times) < 5 or time.perf_counter() - started < BUDGET:
        before = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def _main_memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def find_gpu(name: str, dtype: str) -> Gpu:
    """Return a GPU by name; ``here`` measures this machine now, with weights of type ``dtype``.

    Raises:
        NLDError: the name is unknown, or the type is not measured here.
    """
    if name == HERE:
        return calibrate(dtype)
    if name not in GPUS:
        raise NLDError(f"--gpu {name}: allowed are {', '.join(GPUS)}, {HERE}")
    return GPUS[name]
