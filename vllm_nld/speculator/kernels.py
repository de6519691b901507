"""Triton kernels of the speculator: a draft pass's inputs, where its results go, and which drafts are accepted.

A *slot* is a place in a draft pass, of as many tokens as the pass gives each request; a *row* is a place in vLLM's
batch; a request keeps its index in vLLM's tables for as long as it lives.
"""

import triton
import triton.language as tl

REJECTION, EXACT, COMMIT = 0, 1, 2
"""How a request's drafts are verified: by rejection sampling; by the verifier's own token; accepted as they are.

The kernels write the numbers out, because Triton reads no plain globals.
"""


@triton.jit(do_not_specialize=["num_rows", "used_slots", "slot_length"])
def prepare_kernel(
    # the batch
    slot_of_row, request_of_row, seq_lens, num_rejected, last_sampled, table, table_stride,
    # tables of requests
    lengths, kinds, adapters, temperature, seeds,
    # inputs of the pass, by slot
    ids, positions, prefix_lens, adapted, pages, pages_stride, row_of_slot, block_lens,
    # inputs of the choice, by draft
    draw_requests, draw_positions,
    # tables that the choice and the next step's verification read, by request; results, by row
    own_temperature, own_seeds, valid, drafts, drafts_stride,
    num_rows, used_slots, slot_length, max_model_len, mask_token, page_size, no_request, own_stream,
    TOKENS: tl.constexpr, PAGES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program per row of the batch, then one per slot that is padding."""
    program = tl.program_id(0)
    token = tl.arange(0, TOKENS)
    is_row = program < num_rows
    row = tl.where(is_row, program, 0)
    request = tl.load(request_of_row + row)
    slot = tl.load(slot_of_row + row)
    slot = tl.where(is_row, slot, used_slots + program - num_rows)
    seed_token = tl.load(last_sampled + request)

    if is_row:
        # Until drafts are there, any token that the model can read; none of them counts as a draft.
        step = tl.arange(0, STEPS)
        tl.store(drafts + row * drafts_stride + step, seed_token + step * 0, mask=step < drafts_stride)
        if slot < 0:
            tl.store(valid + request, 0)

    if slot >= 0:
        prefix = tl.load(seq_lens + row) - tl.load(num_rejected + row)
        prefix = tl.where(is_row, prefix, 0)
        length = tl.minimum(tl.load(lengths + request), slot_length)
        length = tl.maximum(1, tl.minimum(length, max_model_len - prefix))
        length = tl.where(is_row, length, slot_length)
        first = slot * slot_length
        inside = token < slot_length

        tl.store(ids + first + token, tl.where((token == 0) & is_row, seed_token.to(tl.int32), mask_token), mask=inside)
        position = tl.minimum(prefix + token, max_model_len - 1)
        tl.store(positions + first + token, position.to(tl.int64), mask=inside)
        tl.store(prefix_lens + slot, prefix)
        tl.store(block_lens + slot, length)
        tl.store(row_of_slot + slot, tl.where(is_row, row, -1))
        is_adapted = tl.load(adapters + request) * is_row
        tl.store(adapted + first + token, (is_adapted + token * 0).to(adapted.dtype.element_ty), mask=inside)

        used = tl.cdiv(prefix, page_size)
        for start in range(0, used, PAGES):
            page = start + tl.arange(0, PAGES)
            known = tl.load(table + row * table_stride + page, mask=page < used, other=0)
            tl.store(pages + slot * pages_stride + page, known, mask=page < used)

        # vLLM draws the token after a position by that position's noise. Drafts that are verified by rejection
        # sampling must not share it.
        is_draft = token < slot_length - 1
        counts = (token < length - 1) & is_row
        place = slot * (slot_length - 1) + token
        tl.store(draw_requests + place, tl.where(counts, request, no_request).to(tl.int64), mask=is_draft)
        stream = tl.where(tl.load(kinds + request) == 0, own_stream, 0)
        tl.store(draw_positions + place, (prefix + token + stream).to(tl.int64), mask=is_draft)
        if is_row:
            tl.store(valid + request, length - 1)
            tl.store(own_temperature + request, tl.load(temperature + request))
            tl.store(own_seeds + request, tl.load(seeds + request))


@triton.jit(do_not_specialize=["first_slot", "slot_length"])
def hand_out_kernel(
    tokens, row_of_slot, block_lens, drafts, drafts_stride, first_slot, slot_length, TOKENS: tl.constexpr
):  # fmt: skip
    """One program per slot of a pass: its tokens go to its row's drafts, as far as its block reaches."""
    slot = tl.program_id(0)
    row = tl.load(row_of_slot + first_slot + slot)
    length = tl.load(block_lens + first_slot + slot)
    token = tl.arange(0, TOKENS)
    if row >= 0:
        inside = token < length - 1
        chosen = tl.load(tokens + slot * (slot_length - 1) + token, mask=inside)
        tl.store(drafts + row * drafts_stride + token, chosen, mask=inside)


@triton.jit
def accept_kernel(
    sampled, sampled_stride, num_sampled, drafts, targets, starts, request_of_row, kinds, valid, handed, handed_stride,
    EVERY: tl.constexpr,
):  # fmt: skip
    """One program per row: the drafts that are the verifier's own tokens, and its token after them.

    Args:
        sampled: int64 ``[rows, steps + 1]``, written; as ``num_sampled`` int32 ``[rows]``.
        drafts: ``[logits]``: a row's drafts are one place after the logits that verify them.
        targets: int64 ``[logits]``.
        starts: int32 ``[rows + 1]``.
        handed: int64 ``[requests, steps]``, all of a request's last drafts. Where a step has no room for all of what it
            is to commit, the token after them is not the verifier's, but the next of these.
        EVERY: whether to judge all rows; else those that vLLM's rejection sampler has judged are not changed.
    """
    row = tl.program_id(0)
    request = tl.load(request_of_row + row)
    kind = tl.load(kinds + request)
    if EVERY or kind != 0:
        start = tl.load(starts + row).to(tl.int64)
        count = tl.load(starts + row + 1) - start - 1
        offered = tl.minimum(count, tl.load(valid + request))
        going = count >= 0
        accepted = 0
        for index in range(offered):
            if going:
                draft = tl.load(drafts + start + index + 1).to(tl.int64)
                target = tl.load(targets + start + index)
                going = (draft >= 0) & ((draft == target) | (kind == 2))
                tl.store(sampled + row * sampled_stride + index, tl.where(going, draft, target))
                accepted += tl.where(going, 1, 0)
        if going:
            last = tl.load(targets + start + accepted)
            if (kind == 2) & (tl.load(valid + request) > count):
                last = tl.load(handed + request * handed_stride + count)
            tl.store(sampled + row * sampled_stride + accepted, last)
        tl.store(num_sampled + row, accepted + 1)
