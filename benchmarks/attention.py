"""Draft attention on the CPU: the C++ operator against its peers, with medians and ratios of one run.

Peers: (a) gather the pages and call PyTorch's SDPA; (b) vLLM's own CPU attention operator, run without a causal mask
over the same pages, after writing the block to them, as its decode path would. The roofline line gives this machine's
speed: PyTorch's bf16 product, and copying.

python benchmarks/attention.py --json results.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vllm_nld.ops import BlockAttention, cpp_ops
from vllm_nld.ops.pages import STRIDED, TILED, PageLayout

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 128
GPU_PAGE = 16  # vLLM's default there
COLUMNS = STRIDED[0]  # vLLM's CPU backend writes this without AMX; peer (b) reads only this on such a CPU
SIDE_BY_SIDE = STRIDED[2]  # keys next to values: the layout of vLLM's GPU backends


@dataclass
class Point:
    """Rows, each with a prefix and a block of fresh tokens."""

    prefix: int
    length: int
    rows: int
    dtype: torch.dtype
    causal: bool = False
    tiles: bool = False  # pages of a CPU with AMX
    device: str = "cpu"
    heads_first: bool = False  # in memory a GPU's page goes by heads, then tokens (vLLM's HND); else NHD

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(0)
        self.page = PAGE if self.device == "cpu" else GPU_PAGE
        pages_per_row = -(-(self.prefix + self.length) // self.page)
        pages, tokens = self.rows * pages_per_row, self.rows * self.length

        def random(*shape: int) -> Tensor:
            drawn = torch.randn(*shape, generator=generator, dtype=torch.float32, device=self.device)
            return drawn.to(self.dtype)

        def ints(values: Tensor) -> Tensor:
            return values.to(self.device, torch.int32)

        self.query, self.key, self.value = random(tokens, HEADS, DIM), *random(2, tokens, KV_HEADS, DIM)
        if self.device == "cpu" or self.heads_first:
            self.cache = random(pages, KV_HEADS, self.page, 2 * DIM)
        else:
            self.cache = random(pages, self.page, KV_HEADS, 2 * DIM).transpose(1, 2)
        order = torch.randperm(pages, generator=generator, device=self.device)
        self.table = order.view(self.rows, pages_per_row).to(torch.int32)
        self.prefixes = ints(torch.full((self.rows,), self.prefix))
        self.starts = ints(torch.arange(self.rows + 1) * self.length)
        self.kinds = ints(torch.full((self.rows,), int(self.causal)))
        self.output = torch.empty_like(self.query)
        place = self.prefix + torch.arange(self.length, device=self.device)
        self.slots = (self.table.long()[:, place // self.page] * self.page + place % self.page).flatten()

    @property
    def layout(self) -> PageLayout:
        """Layout of the pages."""
        if self.device != "cpu":
            return SIDE_BY_SIDE
        return TILED if self.tiles else COLUMNS

    @property
    def flops(self) -> float:
        """Operations of both products."""
        return 4.0 * HEADS * DIM * self.rows * self.length * (self.prefix + self.length)

    @property
    def bytes(self) -> float:
        """Keys and values of the prefix, each read once."""
        return 2.0 * self.rows * self.prefix * KV_HEADS * DIM * self.query.element_size()

    def ours(self, implementation: Any = cpp_ops) -> Tensor:
        """The operator under test, in one of its implementations."""
        keys, values = self.layout.split(self.cache, DIM)
        call = BlockAttention(
            self.query, self.key, self.value, keys, values, self.table, self.prefixes, self.starts, self.kinds,
            DIM**-0.5, 1.0, 1.0, self.length, self.prefix, self.output,
            int(self.causal),
        )  # fmt: skip
        implementation.block_attention(call)
        return self.output

    def gather_sdpa(self) -> Tensor:
        """Peer (a); all rows have prefixes of equal length here, so there is no padding and no mask."""
        pages = self.table[:, : -(-self.prefix // self.page)].long()
        keys, values = self.layout.gather(self.cache, DIM, pages, self.prefix)
        shape = (self.rows, self.length, -1, DIM)
        keys = torch.cat((keys, self.key.view(shape).transpose(1, 2)), 2)
        values = torch.cat((values, self.value.view(shape).transpose(1, 2)), 2)
        query = self.query.view(self.rows, self.length, KV_HEADS, -1, DIM).permute(0, 2, 3, 1, 4)
        out = F.scaled_dot_product_attention(query.flatten(2, 3), keys, values, scale=DIM**-0.5)
        out = out.view(self.rows, KV_HEADS, -1, self.length, DIM).permute(0, 3, 1, 2, 4)
        return out.reshape(self.query.shape)

    def prepare_stock(self) -> None:
        """Metadata of peer (b). vLLM builds it once per step, not once per layer, so it is not timed."""
        from vllm import _custom_ops as ops

        self.seq_lens = self.prefixes + self.length
        self.stock_output = torch.empty_like(self.query)
        self.metadata = ops.cpu_attn_get_scheduler_metadata(
            self.rows, HEADS, KV_HEADS, DIM, self.seq_lens, self.dtype, self.starts, self.causal, -1, "vec", True
        )

    def stock(self) -> Tensor:
        """Peer (b)."""
        from vllm import _custom_ops as ops

        keys, values = self.cache.view(len(self.cache), KV_HEADS, 2 * PAGE, DIM).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(self.key, self.value, keys, values, self.slots, "vec")
        ops.cpu_attention_with_kv_cache(
            query=self.query, key_cache=keys, value_cache=values, output=self.stock_output,
            query_start_loc=self.starts, seq_lens=self.seq_lens, scale=DIM**-0.5, causal=self.causal,
            alibi_slopes=None, sliding_window=-1, block_table=self.table, softcap=0.0,
            scheduler_metadata=self.metadata, s_aux=None,
        )  # fmt: skip
        return self.stock_output


def medians(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median seconds of each call. The calls take turns, so that a slow moment of the machine affects all equally."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def machine(dtype: torch.dtype) -> dict[str, float]:
    """GFLOP/s of PyTorch's product with 128 rows (a KV head's queries in a block of 32), and GB/s of copying."""
    rows, layer = torch.randn(128, 4096).to(dtype), torch.nn.Linear(4096, 4096, bias=False, dtype=dtype)
    big = torch.empty(1 << 27, dtype=torch.uint8)
    other = torch.empty_like(big)
    with torch.inference_mode():
        found = medians({"gemm": lambda: layer(rows), "copy": lambda: other.copy_(big)}, 1.0)
    flops = 2.0 * 128 * 4096 * 4096
    return {"gemm_gflops": flops / found["gemm"] / 1e9, "copy_gb_per_s": 2 * big.numel() / found["copy"] / 1e9}


def measure(point: Point, limits: dict[str, float], seconds: float) -> dict[str, Any]:
    """Check that all three agree, and time them."""
    point.prepare_stock()
    truth = point.gather_sdpa().float() if not point.causal else point.stock().float()
    for found in (point.ours(), *([] if point.tiles else [point.stock()])):
        assert (found.float() - truth).abs().max() < 0.05, "an implementation is wrong"
    calls: dict[str, Callable[[], Any]] = {"ours": point.ours}
    if not point.tiles:
        calls["stock"] = point.stock
    if not point.causal:
        calls["gather_sdpa"] = point.gather_sdpa
    times = medians(calls, seconds)
    gflops = point.flops / times["ours"] / 1e9
    return {
        "prefix": point.prefix,
        "length": point.length,
        "rows": point.rows,
        "causal": point.causal,
        "ms": {name: round(value * 1e3, 3) for name, value in times.items()},
        "stock_to_ours": ratio(times, "stock"),
        "sdpa_to_ours": ratio(times, "gather_sdpa"),
        "gflops": round(gflops, 1),
        "share_of_gemm": round(gflops / limits["gemm_gflops"], 3),
        "gb_per_s": round(point.bytes / times["ours"] / 1e9, 2),
    }


def ratio(times: dict[str, float], peer: str) -> float | None:
    """A peer's time over ours, if it was measured."""
    return round(times[peer] / times["ours"], 2) if peer in times else None


def show(report: dict[str, Any]) -> None:
    """Print the roofline and the table."""
    console, limits = Console(width=140), report["machine"]
    console.print(
        f"machine: {limits['gemm_gflops']:.0f} GFLOP/s {report['dtype']} product, "
        f"{limits['copy_gb_per_s']:.0f} GB/s copy; "
        f"instruction set {report['instruction_set']}, {report['threads']} threads"
    )
    columns = ("prefix", "L", "rows", "mask", "ours ms", "(b) stock ms", "(a) gather+SDPA ms", "b / ours", "a / ours")
    table = Table(*columns, "GFLOP/s", "of product")
    for row in report["results"]:
        ms = row["ms"]
        table.add_row(
            str(row["prefix"]), str(row["length"]), str(row["rows"]), "causal" if row["causal"] else "all",
            *(f"{ms[name]:.2f}" if name in ms else "-" for name in ("ours", "stock", "gather_sdpa")),
            *(f"{row[name] or '-'}" for name in ("stock_to_ours", "sdpa_to_ours")), f"{row['gflops']:.0f}",
            f"{row['share_of_gemm']:.0%}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    """Measure every combination within the limit of cached tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--prefix", type=int, nargs="+", default=[128, 1024, 8192, 32768])
    parser.add_argument("--length", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--most-tokens", type=int, default=1 << 18, help="skip points with more cached tokens")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--isa", default="", help="force avx512bf16, avx512, avx2 or portable")
    parser.add_argument("--causal", action="store_true", help="verify passes: causal mask, compared only with (b)")
    parser.add_argument("--tiles", action="store_true", help="pages of a CPU with AMX; without (b)")
    parser.add_argument("--seconds", type=float, default=1.0, help="per point")
    parser.add_argument("--json", type=Path, help="write the report here")
    args = parser.parse_args()
    if args.causal and args.tiles:
        parser.error("--causal is compared with (b), which does not read --tiles")
    from vllm.platforms import current_platform

    current_platform.import_kernels()  # peer (b), of vLLM's build for this CPU
    reason = cpp_ops.unavailable(torch.device("cpu"))
    if reason:
        parser.error(f"the C++ operator is not available: {reason}")
    dtype = getattr(torch, args.dtype)
    isa, limits = cpp_ops.instruction_set(args.isa), machine(dtype)
    points = [p for p in itertools.product(args.prefix, args.length, args.rows) if p[0] * p[2] <= args.most_tokens]
    results = []
    with torch.inference_mode():
        for point in points:
            results.append(measure(Point(*point, dtype, args.causal, args.tiles), limits, args.seconds))
            print(json.dumps(results[-1]), flush=True)
    report = {
        "dtype": args.dtype, "instruction_set": isa, "threads": torch.get_num_threads(), "machine": limits,
        "heads": [HEADS, KV_HEADS, DIM], "page_size": PAGE, "results": results,
    }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    show(report)


if __name__ == "__main__":
    main()
