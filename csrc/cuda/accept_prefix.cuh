// accept_prefix: one CTA. One thread per row counts the accepted drafts, the CTA sums the counts over all rows, and
// every thread copies its row's tokens to their place.
#pragma once

#include "nld_cuda.h"
#include "platform.cuh"

namespace nld {

constexpr int kAcceptThreads = 1024;
constexpr int kAcceptWarps = kAcceptThreads / 32;

NLD_HOST_DEVICE int count_accepted(const int64_t* drafts, const int64_t* targets, int length) {
    int accepted = 0;
    while (accepted < length && drafts[accepted] == targets[accepted]) ++accepted;
    return accepted;
}

// Sum over this and all earlier threads of the CTA. `totals` is shared memory for kAcceptWarps + 1 numbers; the last
// one becomes the sum over all threads.
NLD_DEVICE int sum_up_to_thread(int value, int* totals) {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    int sum = value;
    for (int distance = 1; distance < 32; distance *= 2) {
        const int before = shuffle_up(sum, distance);
        if (lane >= distance) sum += before;
    }
    if (lane == 31) totals[warp] = sum;
    sync_threads();
    if (thread_index() == 0) {
        int running = 0;
        for (int i = 0; i < kAcceptWarps; ++i) {
            const int total = totals[i];
            totals[i] = running;
            running += total;
        }
        totals[kAcceptWarps] = running;
    }
    sync_threads();
    return sum + totals[warp];
}

NLD_KERNEL(kAcceptThreads)
accept_prefix(const NLD_GRID_CONSTANT NldAcceptPrefix params) {
    int* totals = reinterpret_cast<int*>(shared_memory());
    int64_t packed = 0;  // tokens of all rows before `first`
    for (int first = 0; first < params.rows; first += kAcceptThreads) {
        const int row = first + thread_index();
        const bool any = row < params.rows;
        const int start = any ? params.starts[row] : 0, length = any ? params.starts[row + 1] - start : 0;
        const int64_t* targets = params.targets + start + row;  // read only if the row exists
        const int accepted = any ? count_accepted(params.drafts + start, targets, length) : 0;
        const int64_t end = packed + sum_up_to_thread(any ? accepted + 1 : 0, totals);
        if (any) {
            params.accepted[row] = accepted;
            params.seeds[row] = targets[accepted];
            params.token_starts[row + 1] = static_cast<int32_t>(end);
            for (int i = 0; i <= accepted; ++i) params.tokens[end - accepted - 1 + i] = targets[i];
        }
        packed += totals[kAcceptWarps];
        sync_threads();  // all threads have read the totals; the next round may overwrite them
    }
    if (thread_index() == 0) params.token_starts[0] = 0;
    const int64_t all = static_cast<int64_t>(params.drafts_total) + params.rows;
    for (int64_t i = packed + thread_index(); i < all; i += kAcceptThreads) params.tokens[i] = -1;
}

}  // namespace nld
