"""The operators of ``docs/developer/operators.md`` in plain PyTorch: the reference for every other implementation.

Given float64 tensors, everything is computed in float64: the tests' oracle. Otherwise matrix products are in the
input's dtype and softmax is float32, as PyTorch users write attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_nld.ops.arguments import CAUSAL, BlockAttention
from vllm_nld.ops.implementation import Implementation
from vllm_nld.ops.pages import page_size, whole_pages

_ONE_BYTE = 1
_LOGITS_AT_A_TIME = 1 << 20
"""Logits that are converted to float32 together: 8 rows of a vocabulary of 131072, 4 MiB."""


def block_attention(call: BlockAttention) -> None:
    """Write attention of every fresh token over its row's cached prefix and its own block, row by row."""
    starts, kinds = call.block_starts.tolist(), call.mask_kinds.tolist()
    for row, cached in enumerate(call.prefix_lens.tolist()):
        fresh = slice(starts[row], starts[row + 1])
        length = fresh.stop - fresh.start
        if length == 0:
            continue
        pools = zip((call.key_pages, call.value_pages), call.page_scales(), (call.key, call.value), strict=True)
        keys, values = (
            torch.cat((_prefix(pages, call.block_table[row], cached, scale, x), x[fresh].transpose(0, 1)), 1)
            for pages, scale, x in pools
        )
        mask = torch.ones(length, cached + length, dtype=torch.bool, device=keys.device)
        if kinds[row] == CAUSAL:
            mask = mask.tril(cached)
        call.output[fresh] = _attend(call.query[fresh], keys, values, mask, call.scale)


def _prefix(pages: Tensor, table: Tensor, tokens: int, scale: float | Tensor, like: Tensor) -> Tensor:
    """Return the first ``tokens`` cached tokens of one row, ``[Hkv, tokens, D]``, dequantized to ``like``'s dtype."""
    used = whole_pages(pages, table[: -(-tokens // page_size(pages))].long())  # [pages, Hkv, S, D]
    flat = used.transpose(0, 1).flatten(1, 2)[:, :tokens]
    if flat.element_size() > _ONE_BYTE:
        return flat.to(like.dtype)
    wide = torch.promote_types(like.dtype, torch.float32)
    return (flat.to(wide) * scale).to(like.dtype)


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of one row, ``[L, H, D]``, from keys and values ``[Hkv, K, D]`` and a mask ``[L, K]``."""
    length, heads, head_dim = query.shape
    kv_heads = keys.shape[0]
    folded = query.view(length, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)  # [Hkv, H/Hkv, L, D]
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (folded @ keys[:, None].transpose(-1, -2)).to(wide) * scale
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights.to(query.dtype) @ values[:, None]).permute(2, 0, 1, 3).reshape(length, heads, head_dim)


def accept_prefix(drafts: Tensor, targets: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return how many drafts each row accepts, the tokens it emits, where they begin, and the last of them.

    Args:
        drafts: int64 ``[N]``, draft tokens of all rows end to end.
        targets: int64 ``[N + R]``, row r's ``n_r + 1`` verifier tokens from ``starts[r] + r`` on.
        starts: int32 ``[R + 1]``.

    Returns:
        accepted int32 ``[R]``; tokens int64 ``[N + R]``, -1 after the last; token_starts int32 ``[R + 1]``;
        seeds int64 ``[R]``.
    """
    rows = starts.shape[0] - 1
    index = torch.arange(rows, device=drafts.device)
    firsts = starts[:-1].long() + index  # of each row, in targets
    row_of_draft = _row_of(starts[1:], drafts.shape[0])
    row_of_target = _row_of(starts[1:] + index + 1, targets.shape[0])

    place = torch.arange(drafts.shape[0], device=drafts.device)
    wrong = drafts != targets[place + row_of_draft]
    lengths = (starts[1:] - starts[:-1]).long()
    offsets = place - starts.long()[row_of_draft]
    first_wrong = torch.where(wrong, offsets, lengths[row_of_draft])
    accepted = lengths.scatter_reduce(0, row_of_draft, first_wrong, "amin")

    token_starts = torch.zeros_like(starts)
    token_starts[1:] = torch.cumsum(accepted + 1, 0)
    offsets = torch.arange(targets.shape[0], device=targets.device) - firsts[row_of_target]
    # Tokens that are not accepted go to one place after the end, so that no size depends on the data.
    end = targets.shape[0]
    to = torch.where(offsets <= accepted[row_of_target], token_starts.long()[row_of_target] + offsets, end)
    tokens = targets.new_full((end + 1,), -1).scatter(0, to, targets)[:end]
    return accepted.int(), tokens, token_starts, targets[firsts + accepted]


def _row_of(ends: Tensor, count: int) -> Tensor:
    """Return int64 ``[count]``: the row of each place, given where the rows end; empty rows are skipped."""
    return torch.searchsorted(ends.long(), torch.arange(count, device=ends.device), right=True)


def best_tokens(logits: Tensor, with_normalizer: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's most probable token, its logit and the row's normalizer.

    Args:
        logits: ``[rows, vocab]``, any float dtype; at least one column.
        with_normalizer: whether to compute the normalizer.

    Returns:
        tokens int64 ``[rows]``, of equal logits the first, or the first NaN; largest float32 ``[rows]``; the
        log-sum-exp float32 ``[rows]``, or ``[0]`` without it. The latter two are float64 for float64 logits.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    rows = logits.shape[0]
    tokens = logits.new_empty(rows, dtype=torch.int64)
    largest = logits.new_empty(rows, dtype=wide)
    normalizer = logits.new_empty(rows if with_normalizer else 0, dtype=wide)
    step = max(1, _LOGITS_AT_A_TIME // logits.shape[1])
    for some in (slice(first, first + step) for first in range(0, rows, step)):
        chunk = logits[some].to(wide)
        torch.argmax(chunk, -1, out=tokens[some])
        torch.gather(chunk, 1, tokens[some, None], out=largest[some, None])
        if with_normalizer:
            torch.logsumexp(chunk, -1, out=normalizer[some])
    return tokens, largest, normalizer


IMPLEMENTATION = Implementation(
    name="torch",
    devices=("cpu", "cuda"),
    block_attention=block_attention,
    accept_prefix=accept_prefix,
    best_tokens=best_tokens,
    reads_tiles=True,
    copies_float8=True,
)
