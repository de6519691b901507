"""GPUs that ``vllm-nld plan`` knows: their makers' figures, and the share that a decoder reaches.

Rates are dense (without structured sparsity). Link bandwidth is per direction and GPU, inside one node.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_nld.errors import NLDError

HERE = "here"
"""Name of the machine that the command runs on; see :mod:`vllm_nld.planning.this_machine`."""

FLOAT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "fp8": 1}
"""Bytes of a value by the name of its type. Of weights: :mod:`vllm_nld.planning.weight_formats`."""

NVLINK_LATENCY, PCIE_LATENCY = 8e-6, 25e-6


@dataclass(frozen=True)
class Gpu:
    """One GPU, and its link to the other GPUs of a node.

    Attributes:
        name: the value of ``--gpu``.
        memory: bytes.
        bandwidth: memory bandwidth, bytes/s.
        flops: operations/s of a matrix product, by the type that is multiplied.
        link_bandwidth: bytes/s to the other GPUs, in one direction; 0: not known.
        link_latency: seconds of a collective operation in addition to moving its bytes.
        bandwidth_share, flops_share: share of the two rates that a large kernel reaches.
        kernel_seconds: start and end of one kernel, during which memory and arithmetic units are idle.
        host_seconds: an engine step outside its forward: scheduling, preparation, bookkeeping after sampling.
        reserved: bytes that weights, activations and KV cannot use: driver, CUDA graphs, libraries.
    """

    name: str
    memory: float
    bandwidth: float
    flops: dict[str, float] = field(hash=False)
    link_bandwidth: float = 0.0
    link_latency: float = NVLINK_LATENCY
    bandwidth_share: float = 0.85
    flops_share: float = 0.70
    kernel_seconds: float = 3e-6
    host_seconds: float = 0.5e-3
    reserved: float = 2e9

    def rate(self, dtype: str) -> float:
        """Return the FLOP/s that a large product of this type reaches.

        Raises:
            NLDError: the GPU has no such units.
        """
        if dtype not in self.flops:
            allowed = ", ".join(sorted(self.flops))
            raise NLDError(f"--dtype {dtype}: {self.name} has no units for it; allowed there: {allowed}")
        return self.flops[dtype] * self.flops_share

    def seconds(self, flops: float, moved: float, dtype: str) -> float:
        """Return the seconds of ``flops`` operations on ``moved`` bytes.

        Reads and arithmetic overlap, but not fully, so this is the root of the sum of both squares: the larger one
        where they differ much, and 1.4 times that where they are equal.
        """
        arithmetic, reads = flops / self.rate(dtype), self.read_seconds(moved)
        return float((arithmetic**2 + reads**2) ** 0.5)

    def read_seconds(self, moved: float) -> float:
        """Return the seconds that reading or writing ``moved`` bytes takes."""
        return moved / (self.bandwidth * self.bandwidth_share)


def _rates(half: float, fp8: float | None, single: float, int8: float | None = None) -> dict[str, float]:
    """Return rates by type, from TFLOP/s. That of int8, unless given, is fp8's."""
    rates = {"bfloat16": half, "float16": half, "float32": single} | ({"fp8": fp8, "int8": fp8} if fp8 else {})
    rates |= {"int8": int8} if int8 else {}
    return {dtype: tera * 1e12 for dtype, tera in rates.items()}


_ALL = (
    Gpu("a100", 80e9, 2.039e12, _rates(312, None, 19.5, 624), 300e9),
    Gpu("h100", 80e9, 3.35e12, _rates(989, 1979, 67), 450e9),
    Gpu("h200", 141e9, 4.8e12, _rates(989, 1979, 67), 450e9),
    Gpu("b200", 180e9, 8.0e12, _rates(2250, 4500, 75), 900e9),
    Gpu("gb200", 186e9, 8.0e12, _rates(2500, 5000, 80), 900e9),
    Gpu("l4", 24e9, 300e9, _rates(121, 242, 30), 25e9, PCIE_LATENCY),
    Gpu("l40s", 48e9, 864e9, _rates(362, 733, 91), 25e9, PCIE_LATENCY),
    Gpu("rtxpro6000", 96e9, 1.792e12, _rates(504, 1008, 125), 50e9, PCIE_LATENCY),
    Gpu("spark", 128e9, 273e9, _rates(125, 250, 31)),
)

GPUS = {gpu.name: gpu for gpu in _ALL}
