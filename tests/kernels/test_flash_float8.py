"""FlashAttention's calls over float8 pages, with a stand-in for its kernel: this machine has none that runs it.

The stand-in does what vLLM documents: float8 queries, keys and values, each with a factor for each row and KV head.
``tests/gpu/test_flash.py`` is for a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import cases
from vllm_nld.errors import NLDError
from vllm_nld.ops import flash_ops, torch_ops

E4M3 = torch.float8_e4m3fn
SPECS = {
    "one scale": cases.AttentionSpec((70, 3, 0), (4, 5, 2), (0, 0, 0), (3, 2), cache=E4M3, layout=2, loose=True),
    "by head": cases.AttentionSpec((40, 33), (4, 5), (1, 1), (2, 3), cache=E4M3, layout=4, by_head=True, padding=2),
    "both masks": cases.AttentionSpec((40, 0, 17), (4, 5, 1), (0, 1, 1), cache=E4M3, layout=2, by_head=True),
}


def flash_attention(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    """Attend row by row in float32; output ``[T, H, D]`` and log-sum-exp ``[H, T]``."""
    assert q.dtype == k.dtype == v.dtype, "FlashAttention multiplies equal types only"
    assert (q.dtype == E4M3) == ("q_descale" in given)
    tokens, heads, _ = q.shape
    kv_heads = k.shape[-2]
    output, lse = torch.zeros(q.shape), torch.full((heads, tokens), -torch.inf)
    starts = given["cu_seqlens_q"].tolist()
    for row in range(len(starts) - 1):
        mine = slice(starts[row], starts[row + 1])
        keys, values = (_of_row(pool, row, given) for pool in (k, v))
        query = q[mine].float().unflatten(1, (kv_heads, -1))
        factors = [given.get(name) for name in ("q_descale", "k_descale", "v_descale")]
        if factors[0] is not None:
            assert all(factor.shape == (len(starts) - 1, kv_heads) for factor in factors)
            query, keys, values = (
                x * factor[row].view(1, kv_heads, *[1] * (x.dim() - 2))
                for x, factor in zip((query, keys, values), factors, strict=True)
            )
        scores = torch.einsum("lhgd,nhd->hgln", query, keys) * given["softmax_scale"]
        if given["causal"]:
            scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
        weights = scores.softmax(-1) if scores.shape[-1] else scores
        output[mine] = torch.einsum("hgln,nhd->lhgd", weights, values).flatten(1, 2)
        lse[:, mine] = scores.logsumexp(-1).flatten(0, 1)
    return output.to(torch.bfloat16 if q.dtype == E4M3 else q.dtype), lse


def _of_row(pool: Tensor, row: int, given: dict[str, Any]) -> Tensor:
    """The keys or values ``[N, Hkv, D]`` that a row attends to."""
    if "block_table" not in given:
        starts = given["cu_seqlens_k"].tolist()
        return pool[starts[row] : starts[row + 1]].float()
    count, size = int(given["seqused_k"][row]), pool.shape[1]
    pages = given["block_table"][row, : -(-count // size)].long()
    return pool[pages].float().flatten(0, 1)[:count]


def merge(output: Tensor, first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> None:
    """What vLLM's ``merge_attn_states`` does."""
    assert output.dtype == first.dtype == second.dtype
    both = torch.stack((first_lse, second_lse)).softmax(0).transpose(1, 2)[..., None]
    output.copy_((torch.stack((first, second)).float() * both).sum(0))


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.ops import merge_attn_states

    monkeypatch.setattr(flash_ops, "_flash", lambda: (lambda: True, lambda **_: 3, flash_attention))
    monkeypatch.setattr(merge_attn_states, "merge_attn_states", merge)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rounded", [True, False], ids=["float8 query", "plain query"])
@pytest.mark.parametrize("name", SPECS)
def test_flash_equals_dequantized_pages(name: str, rounded: bool, dtype: torch.dtype) -> None:
    call = cases.attention_arguments(SPECS[name], dtype)
    call = cases.with_float8_query(call) if rounded else call
    expected = cases.oracle(call)
    flash_ops.block_attention(call)
    used = sum(SPECS[name].lengths)
    error = (call.output[:used].double() - expected[:used]).abs().max()
    assert error <= 2 * torch.finfo(torch.bfloat16).eps * expected[:used].abs().max()


def test_pages_are_not_copied_for_a_float8_query(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_ops, "_used_pages", lambda _: pytest.fail("copied"))
    flash_ops.block_attention(cases.with_float8_query(cases.attention_arguments(SPECS["one scale"], torch.bfloat16)))


def test_a_float8_query_without_scales_is_refused() -> None:
    call = cases.with_float8_query(cases.attention_arguments(SPECS["one scale"], torch.bfloat16))
    with pytest.raises(NLDError, match="v_descale"):
        flash_ops.block_attention(call._replace(v_scales=None))


def test_the_reference_ignores_the_float8_query() -> None:
    call = cases.with_float8_query(cases.attention_arguments(SPECS["by head"], torch.float32))
    other = call._replace(float8_query=None, q_scales=None, output=call.output.clone())
    torch_ops.block_attention(call)
    torch_ops.block_attention(other)
    torch.testing.assert_close(call.output, other.output, rtol=0, atol=0, equal_nan=True)
