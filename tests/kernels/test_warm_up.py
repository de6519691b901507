"""Warm-up compiles every kernel that serving runs, before vLLM watches for compilations."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.implementations import INTERPRETING
from tests.kernels.triton_compiler import Compilation, pretended_gpu
from vllm_nld import ops
from vllm_nld.attention.backend import DraftMetadata, block_forward
from vllm_nld.attention.layout import typed_cache
from vllm_nld.draft_pass.warm_up import compilations_allowed, lengths, warm_up
from vllm_nld.model.best_tokens import best_tokens
from vllm_nld.ops import triton_ops
from vllm_nld.ops.pages import LAYOUTS
from vllm_nld.vllm_glue.greedy_verify import verify_greedily
from vllm_nld.worker import hooks as worker

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETING, reason="this process interprets")

HEADS, KV_HEADS, VOCAB, BLOCK = 32, 8, 131072, 32


class Head:
    """A vocabulary head of one rank, whose first columns of logits are the hidden states."""

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return hidden.new_empty(len(hidden), VOCAB)  # never read

    def shard_logits(self, hidden: Tensor) -> tuple[Tensor, int | None]:
        return self.compute_logits(hidden), None


def attention_layer(cache: torch.dtype, head_dim: int = 64) -> Any:
    """An attention layer with a cache of four pages, as vLLM's FlashAttention backend lays them out."""
    pages = torch.zeros(4, 2, 16, KV_HEADS, head_dim, dtype=torch.uint8 if cache.itemsize == 1 else cache)
    return SimpleNamespace(
        kv_cache=pages,
        kv_cache_dtype="fp8" if cache.itemsize == 1 else "auto",
        head_size=head_dim,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        nld_page_layout=LAYOUTS[4],
        _k_scale_float=0.5,
        _v_scale_float=2.0,
    )


def a_draft_pass(dtype: torch.dtype, cache: torch.dtype, max_model_len: int) -> Any:
    """The part of a draft pass that :func:`warm_up` uses."""
    model_config = SimpleNamespace(dtype=dtype, get_hidden_size=lambda: 16)
    return SimpleNamespace(
        layers={"first": attention_layer(cache), "other": attention_layer(cache), "wide": attention_layer(dtype)},
        last_position=max_model_len - 1,
        vllm_config=SimpleNamespace(model_config=model_config),
        device=torch.device("cpu"),
        model=Head(),
        mask_token_id=1,
        activate_tasks=None,
    )


def draft(layer: Any, dtype: torch.dtype, lengths: list[int], prefixes: list[int]) -> None:
    """Attend as a draft pass over these blocks does, with query, key and value in one tensor."""
    size, tokens, rows = layer.head_size, sum(lengths), len(lengths)
    joined = torch.zeros(tokens, (HEADS + 2 * KV_HEADS) * size, dtype=dtype)
    query, key, value = joined.split([HEADS * size, KV_HEADS * size, KV_HEADS * size], -1)
    longest = max(prefixes)
    metadata = DraftMetadata(
        torch.zeros(rows, -(-longest // 16), dtype=torch.int32),
        torch.tensor(prefixes, dtype=torch.int32),
        torch.tensor([0, *lengths]).cumsum(0).int(),
        torch.zeros(rows, dtype=torch.int32),
        max(lengths),
        longest,
    )
    block_forward(layer, 0.1, query, key, value, metadata, torch.empty_like(query))


def verify(rows: int, drafts: int, dtype: torch.dtype) -> None:
    """Verify drafts greedily, with an equal number for every request."""
    metadata = SimpleNamespace(
        cu_num_draft_tokens=torch.arange(drafts, (rows + 1) * drafts, drafts, dtype=torch.int32),
        draft_token_ids=torch.zeros(rows * drafts, dtype=torch.int32),
        target_logits_indices=torch.zeros(rows * drafts, dtype=torch.int32),
        bonus_logits_indices=torch.zeros(rows, dtype=torch.int32),
        max_spec_len=drafts,
    )
    verify_greedily(metadata, torch.empty(rows * (drafts + 1), VOCAB, dtype=dtype))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Compilation]]:
    monkeypatch.setattr(ops, "function", lambda operator, *_: getattr(triton_ops, operator))
    with pretended_gpu() as log:
        yield log


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_serving_compiles_nothing_after_warm_up(compiled: list[Compilation], cache: torch.dtype) -> None:
    dtype = torch.bfloat16
    engine = a_draft_pass(dtype, cache, max_model_len=32768)
    warm_up(engine, BLOCK)
    warm = len(compiled)
    for layer in engine.layers.values():
        assert typed_cache(layer).dtype in (cache, dtype)
        for length in (1, 2, 3, 4, 5, 8, 9, 16, 31, 32):
            for longest in (0, 1, 511, 512, 32700):
                draft(layer, dtype, [length], [longest])
        draft(layer, dtype, [7, 1, 32, 16], [0, 900, 16, 31000])
        draft(layer, dtype, [3] * 33, [8000] * 33)
    for rows in (1, 2, 16, 31, 64):
        best_tokens(engine.model, torch.zeros(rows, 16, dtype=dtype))
        for drafts in (1, 15, 31):
            verify(rows, drafts, dtype)
    assert compiled[warm:] == []


def test_warm_up_compiles_only_existing_variants(compiled: list[Compilation]) -> None:
    """Three tile sizes, with and without split prefixes; then one kernel of each kind and flag."""
    warm_up(a_draft_pass(torch.bfloat16, torch.bfloat16, max_model_len=4096), BLOCK)
    names = [compilation.kernel for compilation in compiled]
    counts = {name: names.count(name) for name in names}
    assert counts == {
        "attention_kernel": 6,
        "merge_kernel": 1,
        "best_kernel": 2,
        "best_merge_kernel": 2,
        "count_kernel": 1,
        "pack_kernel": 1,
    }


@pytest.mark.parametrize("group", [1, 3, 4, 7])
@pytest.mark.parametrize("block_length", [1, 2, 5, 16, 31, 32, 33])
def test_lengths_have_all_tile_sizes(block_length: int, group: int) -> None:
    def tiles(of: list[int]) -> set[tuple[int, int, int]]:
        return {triton_ops._tile_sizes(length * group, 128, 2) for length in of}

    assert tiles(lengths(block_length)) == tiles(list(range(1, block_length + 1)))


class Recorder:
    """vLLM's worker and the proposer, reduced to the order of calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        drafter = SimpleNamespace(draft_pass="pass", block_length=8, measure_costs=self.measure_costs)
        self.model_runner = SimpleNamespace(drafter=drafter)

    def measure_costs(self) -> None:
        from triton import knobs

        self.calls.append("costs, watched" if knobs.runtime.jit_post_compile_hook else "costs")

    def compile_or_warm_up_model(self) -> str:
        from triton import knobs

        self.calls.append("vLLM")
        knobs.runtime.jit_post_compile_hook = self.watch  # as its JIT monitor does at the end
        return "times"

    def watch(self, **_: Any) -> None:
        raise RuntimeError("compilation while serving")


def test_operators_are_warm_before_vllm_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", None)
    recorder = type("Worker", (worker.IntroducesProposer, Recorder), {})()
    monkeypatch.setattr(worker, "warm_up", lambda draft_pass, length: recorder.calls.append(f"{draft_pass} {length}"))
    assert recorder.compile_or_warm_up_model() == "times"
    assert recorder.calls == ["pass 8", "vLLM", "costs"]
    assert knobs.runtime.jit_post_compile_hook == recorder.watch


def test_compilation_watch_resumes_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", print)
    with pytest.raises(ValueError, match="stop"), compilations_allowed():
        assert knobs.runtime.jit_post_compile_hook is None
        raise ValueError("stop")
    assert knobs.runtime.jit_post_compile_hook is print
