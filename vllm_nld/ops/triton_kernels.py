"""Triton kernels of the operators. Importing this needs Triton; ``triton_ops`` launches them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)


def _kernel(*changing: str) -> Callable[[Callable[..., Any]], Any]:
    """Make a kernel that is not compiled again for other values of the ``changing`` arguments.

    Triton compiles in whether an integer is 1, and whether it or an address divides by 16. That helps for values
    that are the same in all of a model's calls; for sizes of a batch it would compile while requests wait.
    """
    compiled: Callable[[Callable[..., Any]], Any] = triton.jit(do_not_specialize=changing)
    return compiled


@triton.jit
def _float8_to_half(raw, E5M2: tl.constexpr):
    """Decode bytes of float8_e5m2 (exactly) or float8_e4m3fn (divided by 256) into float16.

    By hand, because Triton refuses float8_e4m3fn on GPUs before Ada. An e4m3 number's exponent and mantissa, moved into
    float16's fields, mean the number divided by 2 ** (15 - 7), also if subnormal; the caller's scale corrects it.
    """
    wide = raw.to(tl.int16)
    if E5M2:
        moved = wide << 8
    else:
        moved = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return moved.to(tl.float16, bitcast=True)


@triton.jit
def _dot(a, b, UPCAST: tl.constexpr):
    """Product with float32 sums. UPCAST is for the interpreter, whose bfloat16 products are wrong."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _attend(acc, top, total, query, keys, values, visible, scale_log2, UPCAST: tl.constexpr):
    """One step of online softmax.

    acc float32 [M, D], top (largest score so far, in powers of two) and total float32 [M]; query [M, D], keys [D, N],
    values [N, D]; visible bool [M, N].
    """
    scores = _dot(query, keys, UPCAST) * scale_log2
    scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A query that has seen nothing yet has top -inf, and -inf - -inf is NaN.
    finite = tl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = tl.exp2(top - finite)
    weights = tl.exp2(scores - finite[:, None])
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None] + _dot(weights.to(values.dtype), values, UPCAST)
    return acc, new_top, total


@triton.jit
def _load_page_tile(
    pages, page, place, in_prefix, dim, in_head, s_page, s_place, s_dim,
    DTYPE: tl.constexpr, E5M2: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Load cached tokens [BLOCK_D, BLOCK_N] or [BLOCK_N, BLOCK_D] (as the given indices broadcast), zero elsewhere.

    The mask keeps unused slots out: 0 * NaN would be NaN.
    """
    tile = tl.load(pages + page * s_page + place * s_place + dim * s_dim, mask=in_prefix & in_head, other=0)
    if FP8:
        tile = _float8_to_half(tile, E5M2).to(DTYPE)
    return tile  # one return, because Triton requires all returns to have one type, even those that never run


@_kernel(
    "block_table", "prefix_lens", "block_starts", "mask_kinds", "table_row", "tiles", "splits",
    "k_scales", "v_scales", "k_scales_head", "v_scales_head",
)  # fmt: skip
def attention_kernel(
    query, key, value, key_pages, value_pages, block_table, prefix_lens, block_starts, mask_kinds, output,
    part_acc, part_top, part_total,
    q_token, q_head, k_token, k_head, v_token, v_head, o_token, o_head,
    kp_page, kp_head, kp_place, kp_dim, vp_page, vp_head, vp_place, vp_dim,
    table_row, tiles, splits, scale_log2, page_scale_log2, page_value_scale,
    k_scales, v_scales, k_scales_head, v_scales_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    FP8: tl.constexpr, E5M2: tl.constexpr, BY_HEAD: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Attention of one tile of a row's queries for one KV head, over one part of the prefix and (part 0) the block.

    Grid: (rows * tiles, KV heads, splits). A tile is BLOCK_M of the row's (token, head of the group) pairs. With SPLIT,
    unnormalized sums go to part_acc float32 [T, H, splits, D], part_top and part_total float32 [T, H, splits].
    """
    row = tl.program_id(0) // tiles
    kv_head = tl.program_id(1).to(tl.int64)  # heads of a cache may be more than 2 ** 31 elements apart
    split = tl.program_id(2)
    first = tl.load(block_starts + row)
    length = tl.load(block_starts + row + 1) - first
    begin = (tl.program_id(0) % tiles) * BLOCK_M
    if begin >= length * GROUP:
        return

    pair = begin + tl.arange(0, BLOCK_M)
    token = pair // GROUP
    head = kv_head * GROUP + pair % GROUP
    in_block = token < length
    dim = tl.arange(0, BLOCK_D)
    in_head = dim < D
    at = (first + token).to(tl.int64)
    stored = in_block[:, None] & in_head[None, :]
    q = tl.load(query + (at * q_token + head * q_head)[:, None] + dim[None, :], mask=stored, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    if BY_HEAD:
        page_scale_log2 *= tl.load(k_scales + kv_head * k_scales_head)
        page_value_scale *= tl.load(v_scales + kv_head * v_scales_head)
    cached = tl.load(prefix_lens + row)
    start = 0
    stop = cached
    if SPLIT:
        chunk = tl.cdiv(tl.cdiv(cached, splits), BLOCK_N) * BLOCK_N
        start = split * chunk
        stop = tl.minimum(cached, start + chunk)
    for offset in range(start, stop, BLOCK_N):
        position = offset + tl.arange(0, BLOCK_N)
        seen = position < stop
        page = tl.load(block_table + row * table_row + position // PAGE, mask=seen, other=0).to(tl.int64)
        place = position % PAGE
        k = _load_page_tile(
            key_pages + kv_head * kp_head, page[None, :], place[None, :], seen[None, :],
            dim[:, None], in_head[:, None], kp_page, kp_place, kp_dim, q.dtype, E5M2, FP8,
        )  # fmt: skip
        v = _load_page_tile(
            value_pages + kv_head * vp_head, page[:, None], place[:, None], seen[:, None],
            dim[None, :], in_head[None, :], vp_page, vp_place, vp_dim, q.dtype, E5M2, FP8,
        )  # fmt: skip
        acc, top, total = _attend(acc, top, total, q, k, v, seen[None, :], page_scale_log2, UPCAST)
    if FP8:
        acc *= page_value_scale  # once for all cached tokens; the fresh ones below are not scaled

    if split == 0:
        kind = tl.load(mask_kinds + row)
        kinds = tl.full([BLOCK_M], 0, tl.int32) + kind  # the interpreter broadcasts a scalar condition wrongly
        last = (tl.minimum(begin + BLOCK_M, length * GROUP) - 1) // GROUP
        stop = tl.where(kind == 1, last + 1, length)  # if causal, nothing after the tile's last query is visible
        for offset in range(0, stop, BLOCK_N):
            other = offset + tl.arange(0, BLOCK_N)
            exists = other < length
            there = (first + other).to(tl.int64)
            k_at = key + kv_head * k_head + (there * k_token)[None, :] + dim[:, None]
            k = tl.load(k_at, mask=exists[None, :] & in_head[:, None], other=0.0)
            v_at = value + kv_head * v_head + (there * v_token)[:, None] + dim[None, :]
            v = tl.load(v_at, mask=exists[:, None] & in_head[None, :], other=0.0)
            visible = (kinds != 1)[:, None] | (other[None, :] <= token[:, None])
            acc, top, total = _attend(acc, top, total, q, k, v, visible & exists[None, :], scale_log2, UPCAST)

    if SPLIT:
        part = (at * HEADS + head) * splits + split
        tl.store(part_top + part, top, mask=in_block)
        tl.store(part_total + part, total, mask=in_block)
        tl.store(part_acc + part[:, None] * D + dim[None, :], acc, mask=stored & (total > 0)[:, None])
    else:
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        out_at = output + (at * o_token + head * o_head)[:, None] + dim[None, :]
        tl.store(out_at, result.to(output.dtype.element_ty), mask=stored)


@_kernel("block_starts", "rows", "splits")
def merge_kernel(
    part_acc, part_top, part_total, block_starts, output, rows, splits, o_token, o_head,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Combine the parts of one token and head. Grid: (T, H)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    if token >= tl.load(block_starts + rows):
        return
    split = tl.arange(0, BLOCK_S)
    dim = tl.arange(0, BLOCK_D)
    part = (token * HEADS + head) * splits + split
    top = tl.load(part_top + part, mask=split < splits, other=float("-inf"))
    total = tl.load(part_total + part, mask=split < splits, other=0.0)
    highest = tl.max(top, 0)
    weight = tl.where(total > 0, tl.exp2(top - highest), 0.0)
    # A part without keys has stored no sums: its memory may hold NaN.
    mask = (total > 0)[:, None] & (dim < D)[None, :]
    acc = tl.load(part_acc + part[:, None] * D + dim[None, :], mask=mask, other=0.0)
    norm = tl.sum(weight * total, 0)
    result = tl.sum(acc * weight[:, None], 0) / tl.where(norm > 0, norm, 1.0)
    tl.store(output + token * o_token + head * o_head + dim, result.to(output.dtype.element_ty), mask=dim < D)


@_kernel("drafts", "targets", "starts", "accepted")
def count_kernel(drafts, targets, starts, accepted, BLOCK: tl.constexpr):
    """Write how many drafts a row accepts. Grid: (R,)."""
    row = tl.program_id(0)
    start = tl.load(starts + row)
    length = tl.load(starts + row + 1) - start
    count = length
    for offset in range(0, length, BLOCK):
        place = offset + tl.arange(0, BLOCK)
        exists = place < length
        draft = tl.load(drafts + start + place, mask=exists, other=0)
        target = tl.load(targets + start + row + place, mask=exists, other=0)
        count = tl.minimum(count, tl.min(tl.where(draft != target, place, length), 0))
    tl.store(accepted + row, count)


@_kernel("targets", "starts", "accepted", "tokens", "token_starts", "seeds")
def pack_kernel(targets, starts, accepted, tokens, token_starts, seeds, BLOCK: tl.constexpr):
    """Copy a row's accepted tokens and the one after them to their place. Grid: (R,)."""
    row = tl.program_id(0)
    before = 0
    for offset in range(0, row, BLOCK):
        other = offset + tl.arange(0, BLOCK)
        before += tl.sum(tl.load(accepted + other, mask=other < row, other=-1) + 1, 0)
    count = tl.load(accepted + row) + 1
    source = targets + tl.load(starts + row) + row
    for offset in range(0, count, BLOCK):
        place = offset + tl.arange(0, BLOCK)
        tl.store(tokens + before + place, tl.load(source + place, mask=place < count), mask=place < count)
    tl.store(token_starts + row + 1, before + count)
    tl.store(seeds + row, tl.load(source + count - 1))


@triton.jit
def _best_of(logit, token, total, SUM: tl.constexpr):
    """Reduce logits float32 [N] to ``(largest, token, total)``: the first NaN or, if there is none, the first largest.

    token int32 [N], all different, and total float32 [N]: for each entry, a sum of exponentials relative to its logit.
    The result's total is relative to the largest logit; with NaN or infinities it has no meaning.
    """
    strange = logit != logit
    rank = tl.max(strange.to(tl.int32), 0)
    peak = tl.max(tl.where(strange, float("-inf"), logit), 0)
    best = strange | ((logit == peak) & (strange.to(tl.int32) == rank))
    chosen = tl.min(tl.where(best, token, 0x7FFFFFFF), 0)
    added = 0.0
    if SUM:
        # Minus infinity minus itself is NaN, but must add nothing.
        shrink = tl.where(logit == float("-inf"), 0.0, tl.exp2((logit - peak) * _LOG2E))
        added = tl.sum(total * shrink, 0)
    return tl.where(rank > 0, float("nan"), peak), chosen, added


@_kernel()
def best_kernel(
    logits, part_largest, part_token, part_total, row_stride, vocab, BLOCK: tl.constexpr, SUM: tl.constexpr
):  # fmt: skip
    """Find the best token of one segment, BLOCK logits, of one row. Grid: (rows, segments), as are the parts."""
    row = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    token = segment * BLOCK + tl.arange(0, BLOCK)
    exists = token < vocab
    logit = tl.load(logits + row * row_stride + token, mask=exists, other=0.0).to(tl.float32)
    logit = tl.where(exists, logit, float("-inf"))
    largest, token, total = _best_of(logit, token, 1.0, SUM)
    part = row * tl.num_programs(1) + segment
    tl.store(part_largest + part, largest)
    tl.store(part_token + part, token)
    if SUM:
        tl.store(part_total + part, total)


@_kernel()
def best_merge_kernel(
    part_largest, part_token, part_total, tokens, largest, normalizers,
    SEGMENTS: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Combine the segments of one row. Grid: (rows,)."""
    row = tl.program_id(0)
    segment = tl.arange(0, BLOCK)
    part = row * SEGMENTS + segment
    exists = segment < SEGMENTS
    top = tl.load(part_largest + part, mask=exists, other=float("-inf"))
    # Missing segments get tokens of their own, after all others.
    token = tl.where(exists, tl.load(part_token + part, mask=exists, other=0), 0x7FFF0000 + segment)
    total = top
    if SUM:
        total = tl.load(part_total + part, mask=exists, other=0.0)
    best, chosen, added = _best_of(top, token, total, SUM)
    tl.store(tokens + row, chosen.to(tl.int64))
    tl.store(largest + row, best)
    if SUM:
        finite = tl.abs(best) < float("inf")
        tl.store(normalizers + row, tl.where(finite, best + tl.log(tl.where(finite, added, 1.0)), best))
