"""Triton kernels of branches on vLLM's second runner: their inputs, which one was hit, and where the next ones start.

A *slot* is a request's place among those that branch in a step. It has as many branches as the step gives each request,
each of as many tokens; branches that are not used are masks that see only each other. A plan belongs to a request, by
its index in vLLM's tables: rows change from step to step.
"""

import triton
import triton.language as tl

MASK, IDLE = -1, -2
"""In place of a guessed token: a mask, which stands for any token; no branch."""
RUN, TOKENS, GUESS, MASKED = range(4)
"""Counters: branches that were run, their tokens, and hits by kind."""
ALL = -1
"""In place of a number of branches: a mask branch after every token."""
STREAMS = 64
"""Streams of noise for drafts of branches, by the block's first position. Whether a branch is hit depends on what was
drawn for later positions, so the next block must not draw these from the same noise. No branch is longer."""

# The kernels write these numbers out, because Triton reads no plain globals.


@triton.jit(do_not_specialize=["count", "length", "max_model_len", "mask_token"])
def lay_out_kernel(
    row_of_slot, request_of_row, seq_lens, query_starts, table, table_stride,
    planned_prefix, places, guesses, plan_stride, counts, adapters,
    ids, positions, prefix_lens, adapted, pages, pages_stride, live, counters,
    count, length, max_model_len, mask_token, page_size,
    LENGTH: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """One program per branch of every slot. A branch is idle if its place is not verified in this step."""
    branch = tl.program_id(0)
    slot, number = branch // count, branch % count
    row = tl.load(row_of_slot + slot)
    is_row = row >= 0
    row = tl.where(is_row, row, 0)
    request = tl.load(request_of_row + row)
    tokens = tl.load(query_starts + row + 1) - tl.load(query_starts + row)
    before = tl.load(seq_lens + row) - tokens
    place = tl.load(places + request * plan_stride + number)
    guess = tl.load(guesses + request * plan_stride + number)
    own = tl.load(counts + request)
    is_row = is_row & ((own < 0) | (number < own))
    is_live = is_row & (guess != -2) & (place < tokens) & (tl.load(planned_prefix + request) == before)
    tl.store(live + branch, is_live.to(tl.int32))

    token = tl.arange(0, LENGTH)
    inside = token < length
    prefix = tl.where(is_live, before + place + 1, 0)
    first = branch * length
    seed = tl.where(is_live & (guess >= 0), guess, mask_token)
    tl.store(ids + first + token, tl.where(token == 0, seed, mask_token), mask=inside)
    tl.store(positions + first + token, tl.minimum(prefix + token, max_model_len - 1).to(tl.int64), mask=inside)
    tl.store(prefix_lens + branch, prefix)
    is_adapted = tl.load(adapters + request) * is_live
    tl.store(adapted + first + token, (is_adapted + token * 0).to(adapted.dtype.element_ty), mask=inside)
    used = tl.cdiv(prefix, page_size)
    for start in range(0, used, PAGES):
        page = start + tl.arange(0, PAGES)
        known = tl.load(table + row.to(tl.int64) * table_stride + page, mask=page < used, other=0)
        tl.store(pages + branch.to(tl.int64) * pages_stride + page, known, mask=page < used)
    if is_live:
        tl.atomic_add(counters + 0, 1)
        tl.atomic_add(counters + 1, length.to(tl.int64))


@triton.jit(do_not_specialize=["count", "length", "max_model_len"])
def hit_kernel(
    slot_of_row, laid_of_row, request_of_row, seq_lens, num_rejected, num_sampled, last_sampled,
    places, guesses, plan_stride, live, lengths, kinds,
    sources, draw_requests, draw_positions, block_lens, valid, counters,
    count, length, max_model_len, no_request, own_stream,
    LENGTH: tl.constexpr,
):  # fmt: skip
    """One program per row: which branch verification ended at, and what is drafted from it.

    A guessed branch goes before a mask. Nothing depends on what a branch drafted.
    """
    row = tl.program_id(0)
    slot = tl.load(slot_of_row + row)
    if slot >= 0:
        request = tl.load(request_of_row + row)
        laid = tl.load(laid_of_row + row)
        seed = tl.load(last_sampled + request)
        place = tl.load(num_sampled + row) - 1
        hit, kind = -1, 0
        if laid >= 0:
            for number in range(count):
                guess = tl.load(guesses + request * plan_stride + number)
                is_here = tl.load(live + laid * count + number) & (
                    tl.load(places + request * plan_stride + number) == place
                )
                is_guessed = (is_here != 0) & (guess == seed)
                is_masked = (is_here != 0) & (guess == -1) & (hit < 0)
                kind = tl.where(is_guessed, 2, tl.where(is_masked, 3, kind))
                hit = tl.where(is_guessed | is_masked, number, hit)
        is_hit = hit >= 0
        if is_hit:
            tl.atomic_add(counters + kind, 1)
        prefix = tl.load(seq_lens + row) - tl.load(num_rejected + row)
        own = tl.minimum(tl.minimum(tl.load(lengths + request), length), max_model_len - prefix)
        own = tl.where(is_hit, tl.maximum(own, 1), 1)
        tl.store(block_lens + slot, own)
        tl.store(valid + request, own - 1)
        token = tl.arange(0, LENGTH)
        inside = token < length - 1
        first = tl.where(is_hit, (laid * count + hit) * length, 0)
        where_to = slot * (length - 1) + token
        tl.store(sources + where_to, (first + 1 + token).to(tl.int64), mask=inside)
        counts = token < own - 1
        tl.store(draw_requests + where_to, tl.where(counts, request, no_request).to(tl.int64), mask=inside)
        stream = tl.where(tl.load(kinds + request) == 0, own_stream + ((prefix % 64) << 24), 0)
        tl.store(draw_positions + where_to, (prefix + token + stream).to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=["length", "most", "max_model_len"])
def plan_kernel(
    slot_of_row, request_of_row, seq_lens, num_rejected, last_sampled, block_lens, tokens, likely, chances, counts,
    looks_past, drafts, drafts_stride, planned_prefix, places, guesses, plan_stride,
    length, most, max_model_len, mask_worth, second, third, fourth,
    PLACES: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program per row: hand out its drafts, and choose where the next verification branches.

    That is :func:`vllm_nld.branches.places.likeliest_places` on the device, or ``every_place``. Without drafts, a mask
    follows the seed, so that it is hit.
    """
    row = tl.program_id(0)
    slot = tl.load(slot_of_row + row)
    if slot >= 0:
        request = tl.load(request_of_row + row)
        drafted = tl.load(block_lens + slot) - 1
        prefix = tl.load(seq_lens + row) - tl.load(num_rejected + row)
        seed = tl.load(last_sampled + request)
        first = slot * (length - 1)
        step = tl.arange(0, STEPS)
        own = tl.load(tokens + first + step, mask=step < drafted, other=0)
        own = tl.where(step < drafted, own, seed)
        tl.store(drafts + row * drafts_stride + step, own, mask=step < drafts_stride)

        place = tl.arange(0, PLACES)[:, None]
        column = tl.arange(0, COLUMNS)[None, :]
        right = tl.load(chances + (first + place) * RANKS, mask=place < drafted, other=0.0)
        before = tl.load(chances + (first + place - 1) * RANKS, mask=(place > 0) & (place <= drafted), other=1.0)
        ends = tl.cumprod(before, 0) * (1 - right)
        # Of the position after all drafts there are candidates only if they come from a branch that looked there.
        looks = (drafted > 0) & (drafted < length - 1) & (tl.load(looks_past + request) != 0)
        is_rank = (place < tl.where(looks, drafted + 1, drafted)) & (column < RANKS)
        token = tl.load(likely + (first + place) * RANKS + column, mask=is_rank, other=-2)
        chance = tl.load(chances + (first + place) * RANKS + column, mask=is_rank, other=0.0)
        draft = tl.load(tokens + first + place, mask=place < drafted, other=-3)
        same = tl.min(tl.where(token == draft, column, COLUMNS), 1)[:, None]
        rank = column - tl.where(column > same, 1, 0)
        share = tl.where(rank == 0, second, tl.where(rank == 1, third, fourth))
        share = tl.where((rank > 2) | (column == same), -1.0, share)
        gains = tl.where(is_rank, ends * tl.where(place < drafted, share, chance), -1.0)
        is_mask = column == RANKS
        gains = tl.where(is_mask & (place <= drafted), ends * mask_worth, gains)
        gains = tl.where(prefix + place + 2 < max_model_len, gains, -1.0)
        count = tl.load(counts + request)
        tl.store(planned_prefix + request, prefix)
        for number in range(most):
            if count < 0:  # after every token
                chosen = (place == number) & is_mask & (gains >= 0)
            else:
                best = tl.max(tl.max(gains, 1), 0)
                best = tl.where((best >= 0) & (number < count), best, 2.0)  # no gain is that much
                at = tl.where(gains == best, place * COLUMNS + column, PLACES * COLUMNS)
                chosen = (at == tl.min(tl.min(at, 1), 0)) & (gains == best)
            found = tl.sum(tl.sum(chosen.to(tl.int32), 1), 0)
            masks = tl.sum(tl.sum((chosen & is_mask).to(tl.int32), 1), 0)
            after = tl.sum(tl.sum(tl.where(chosen, place, 0), 1), 0)
            guess = tl.sum(tl.sum(tl.where(chosen, token, 0), 1), 0)
            gain = tl.sum(tl.sum(tl.where(chosen, gains, 0.0), 1), 0)
            guess = tl.where(found == 0, -2, tl.where(masks > 0, -1, guess))
            tl.store(places + request * plan_stride + number, after)
            tl.store(guesses + request * plan_stride + number, guess.to(tl.int32))
            # A mask leaves less to gain from guesses at its place, and they from it.
            is_here = (place == tl.where(found > 0, after, -1)) & (gains >= 0)
            factor = tl.where(masks > 0, 1 - mask_worth, 1.0)
            less = tl.where(masks > 0, 0.0, gain * mask_worth)
            left = tl.where(is_mask, tl.maximum(gains - less, 0.0), gains * factor)
            gains = tl.where(chosen, -1.0, tl.where(is_here, left, gains))
