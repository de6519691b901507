"""The operators of ``docs/operators.md`` in plain PyTorch: what every other implementation is measured against.

Given float64 tensors, everything is computed in float64: the tests' oracle. Otherwise matrix products are in the
input's dtype and softmax is float32, as PyTorch users write attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_nld.ops.pages import page_size, whole_pages

BIDIRECTIONAL, CAUSAL, WORDS = 0, 1, 2
"""Mask kinds."""

_ONE_BYTE = 1
_LOGITS_AT_A_TIME = 1 << 20
"""That become float32 together: 8 rows of a vocabulary of 131072, 4 MiB."""


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    prefix_lens: Tensor,
    block_starts: Tensor,
    mask_kinds: Tensor,
    mask_words: Tensor | None,
    scale: float,
    k_scale: float,
    v_scale: float,
    max_length: int,
    max_prefix: int,
    output: Tensor,
) -> None:
    """Write attention of every fresh token over its row's cached prefix and its own block, row by row.

    Shapes and dtypes are those of ``docs/operators.md``; the bounds ``max_length`` and ``max_prefix`` are not needed.
    """
    starts, kinds = block_starts.tolist(), mask_kinds.tolist()
    for row, cached in enumerate(prefix_lens.tolist()):
        first, last = starts[row], starts[row + 1]
        if first == last:
            continue
        keys = torch.cat(
            (_prefix(key_pages, block_table[row], cached, k_scale, key), key[first:last].transpose(0, 1)), 1
        )
        values = torch.cat(
            (_prefix(value_pages, block_table[row], cached, v_scale, value), value[first:last].transpose(0, 1)), 1
        )
        words = mask_words[first:last] if mask_words is not None else None
        block = block_mask(kinds[row], last - first, words, query.device)
        mask = torch.cat((block.new_ones(last - first, cached), block), 1)
        output[first:last] = _attend(query[first:last], keys, values, mask, scale)


def block_mask(kind: int, length: int, words: Tensor | None, device: torch.device) -> Tensor:
    """Return bool ``[length, length]``: whether query i of a block sees its fresh token j.

    Args:
        kind: the row's mask kind.
        length: fresh tokens of the block.
        words: int32 ``[length, W]``; read for kind 2 only.
        device: where the mask is wanted.
    """
    tokens = torch.arange(length, device=device)
    if kind == CAUSAL:
        return tokens <= tokens[:, None]
    if kind == WORDS:
        assert words is not None
        return (words[:, tokens // 32] >> (tokens % 32) & 1).bool()
    return torch.ones(length, length, dtype=torch.bool, device=device)


def _prefix(pages: Tensor, table: Tensor, tokens: int, scale: float, like: Tensor) -> Tensor:
    """Return the first ``tokens`` cached tokens of one row, ``[Hkv, tokens, D]``, dequantised to ``like``'s dtype."""
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
    scores = scores.masked_fill(~mask, -torch.inf)
    # A query that sees nothing has only -inf, whose softmax is NaN: zeros are promised.
    weights = scores.softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return (weights.to(query.dtype) @ values[:, None]).permute(2, 0, 1, 3).reshape(length, heads, head_dim)


def accept_prefix(drafts: Tensor, targets: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return how many drafts each row accepts, the tokens that go out, where each row's begin, and each row's last.

    Args:
        drafts: int64 ``[N]``, draft tokens of all rows end to end.
        targets: int64 ``[N + R]``, row r's ``n_r + 1`` verifier tokens from ``starts[r] + r`` on.
        starts: int32 ``[R + 1]``.

    Returns:
        accepted int32 ``[R]``; tokens int64 ``[N + R]``, -1 behind the last; token_starts int32 ``[R + 1]``;
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
    # What is not accepted goes to one place behind the end, so that no size depends on the data.
    behind = targets.shape[0]
    to = torch.where(offsets <= accepted[row_of_target], token_starts.long()[row_of_target] + offsets, behind)
    tokens = targets.new_full((behind + 1,), -1).scatter(0, to, targets)[:behind]
    return accepted.int(), tokens, token_starts, targets[firsts + accepted]


def _row_of(ends: Tensor, count: int) -> Tensor:
    """Return int64 ``[count]``: the row of each place, given where the rows end; empty rows are skipped."""
    return torch.searchsorted(ends.long(), torch.arange(count, device=ends.device), right=True)


def move_kv(caches: list[Tensor], sources: Tensor, targets: Tensor) -> None:
    """Copy keys and values of every source slot to its target slot, in all layers.

    Args:
        caches: per layer, key pages and value pages alternating, each ``[P, Hkv, S, D]``, any strides and dtype.
        sources: int64 ``[N]``, slots: page * S + place.
        targets: int64 ``[N]``; no target is another move's source.
    """
    for pages in caches:
        size = pages.shape[2]
        raw = (
            pages.view(torch.uint8) if pages.element_size() == _ONE_BYTE else pages
        )  # float8 lacks index_put on some devices
        raw[targets // size, :, targets % size] = raw[sources // size, :, sources % size]


def best_tokens(logits: Tensor, with_normaliser: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's most probable token, its logit and the row's normaliser.

    Args:
        logits: ``[rows, vocab]``, any float dtype; at least one column.
        with_normaliser: whether the normaliser is wanted.

    Returns:
        tokens int64 ``[rows]``, of equal logits the first, or the first NaN; largest float32 ``[rows]``; the
        log-sum-exp float32 ``[rows]``, or nothing, ``[0]``. The latter two are float64 for float64 logits.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    rows = logits.shape[0]
    tokens = logits.new_empty(rows, dtype=torch.int64)
    largest = logits.new_empty(rows, dtype=wide)
    normaliser = logits.new_empty(rows if with_normaliser else 0, dtype=wide)
    step = max(1, _LOGITS_AT_A_TIME // logits.shape[1])
    for some in (slice(first, first + step) for first in range(0, rows, step)):
        chunk = logits[some].to(wide)
        torch.argmax(chunk, -1, out=tokens[some])
        torch.gather(chunk, 1, tokens[some, None], out=largest[some, None])
        if with_normaliser:
            torch.logsumexp(chunk, -1, out=normaliser[some])
    return tokens, largest, normaliser
