"""Points of the attention benchmark on this machine's device, and the peers that only a GPU has."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from attention import DIM, HEADS, KV_HEADS, Point, medians
from torch import Tensor

from vllm_nld import ops

FLUSH_BYTES = 1 << 28
"""Bytes written between two timed calls: in a model, a layer's weights go through the cache between two attentions."""


class GPUPoint(Point):
    """A point with vLLM's own GPU attention, FlashAttention, as the peer."""

    def prepare_stock(self) -> None:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

        self.version = get_flash_attn_version(head_size=DIM)
        self.seq_lens = self.prefixes + self.length
        self.stock_output = torch.empty_like(self.query)
        self.unit = torch.ones((), device=self.device)
        by_token = self.cache.transpose(1, 2)
        self.keys, self.values = by_token[..., :DIM], by_token[..., DIM:]  # [pages, page size, KV heads, head size]

    def _flash(self, keys: Tensor, values: Tensor, longest: int, **settings: Any) -> Any:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        return flash_attn_varlen_func(
            q=self.query, k=keys, v=values, cu_seqlens_q=self.starts, max_seqlen_q=self.length, max_seqlen_k=longest,
            softmax_scale=DIM**-0.5, fa_version=self.version, **settings,
        )  # fmt: skip

    def stock(self) -> Tensor:
        """As vLLM in a step: write the block to its pages, then attend over them."""
        from vllm._custom_ops import reshape_and_cache_flash

        reshape_and_cache_flash(self.key, self.value, self.keys, self.values, self.slots, "auto", self.unit, self.unit)
        return self.floor(self.causal)

    def floor(self, causal: bool = True) -> Tensor:
        """One FlashAttention call over pages that already hold the block: the least possible work."""
        self._flash(
            self.keys, self.values, self.prefix + self.length, out=self.stock_output, seqused_k=self.seq_lens,
            block_table=self.table, causal=causal,
        )  # fmt: skip
        return self.stock_output


class FlexPoint:
    """FlexAttention over a point's keys and values, gathered beforehand: a lower bound of its time over pages."""

    def __init__(self, point: Point, compiled: bool) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        pages = point.table[:, : -(-point.prefix // point.page)].long()
        keys, values = point.layout.gather(point.cache, DIM, pages, point.prefix)
        shape = (point.rows, point.length, -1, DIM)
        self.keys = torch.cat((keys, point.key.view(shape).transpose(1, 2)), 2)
        self.values = torch.cat((values, point.value.view(shape).transpose(1, 2)), 2)
        self.query = point.query.view(shape).transpose(1, 2).contiguous()
        self.attend: Any = torch.compile(flex_attention) if compiled else flex_attention

    def __call__(self) -> Tensor:
        out: Tensor = self.attend(self.query, self.keys, self.values, scale=DIM**-0.5, enable_gqa=HEADS != KV_HEADS)
        return out.transpose(1, 2).flatten(0, 1)


def make_point(device: str, prefix: int, length: int, rows: int, **settings: Any) -> Point:
    """Return a bfloat16 point on a device, with its peer prepared."""
    kind = Point if device == "cpu" else GPUPoint
    point = kind(prefix, length, rows, torch.bfloat16, device=device, **settings)
    point.prepare_stock()
    return point


def implementations(device: str) -> tuple[dict[str, ops.Implementation], dict[str, str]]:
    """Return the implementations that compute attention on a device, by name, and why the others do not."""
    usable, reasons = {}, {}
    for found in ops.IMPLEMENTATIONS:
        if device not in found.devices:
            continue
        reason = found.unavailable(torch.device(device))
        if reason is None:
            usable[found.name] = found
        else:
            reasons[found.name] = reason
    return usable, reasons


def device_medians(device: str, calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median seconds of each call on the device; they take turns.

    On a GPU the second-level cache is overwritten before each call. That also keeps the device busy while the host
    launches, so that Python's speed does not limit short calls.
    """
    if device == "cpu":
        return medians(calls, seconds)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(pairs.values()))) < 5:
        for name, call in calls.items():
            pair = _event(), _event()
            flush.zero_()
            pair[0].record()
            call()
            pair[1].record()
            pairs[name].append(pair)
        torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in found) * 1e-3 for name, found in pairs.items()}


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """Return a call that replays a CUDA graph of another: what the device takes, without Python's launches."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def host_seconds(call: Callable[[], Any], synchronize: Callable[[], None], repeats: int = 20) -> float:
    """Seconds that the host spends on a call, on average, without waiting for the device."""
    call()
    synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    seconds = time.perf_counter() - started
    synchronize()
    return seconds / repeats
