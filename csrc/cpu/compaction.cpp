#include "compaction.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>

namespace nld {

void accept_prefix(const AcceptPrefix& call) {
    int64_t* out = call.tokens;
    call.token_starts[0] = 0;
    for (int row = 0; row < call.rows; ++row) {
        const int first = call.starts[row], count = call.starts[row + 1] - first;
        const int64_t *drafts = call.drafts + first, *targets = call.targets + first + row;
        const int accepted = static_cast<int>(std::mismatch(drafts, drafts + count, targets).first - drafts);
        out = std::copy(targets, targets + accepted + 1, out);
        call.accepted[row] = accepted;
        call.seeds[row] = targets[accepted];
        call.token_starts[row + 1] = static_cast<int32_t>(out - call.tokens);
    }
    std::fill(out, call.tokens + call.starts[call.rows] + call.rows, int64_t{-1});
}

bool moves_are_independent(const int64_t* sources, const int64_t* targets, int64_t count) {
    std::unordered_map<int64_t, int64_t> written;
    written.reserve(count);
    for (int64_t i = 0; i < count; ++i) {
        if (!written.emplace(targets[i], i).second) return false;
    }
    for (int64_t i = 0; i < count; ++i) {
        const auto found = written.find(sources[i]);
        if (found != written.end() && found->second != i) return false;
    }
    return true;
}

namespace {

struct Moves {
    const std::vector<MovedPages>& caches;
    const int64_t *sources, *targets;
    int64_t count;
    int threads;
};

void move_slot(const MovedPages& cache, int64_t from, int64_t to) {
    auto at = [&](int64_t slot) {
        const int64_t page = slot / cache.page_size, place = slot % cache.page_size;
        return cache.data + (page * cache.page_stride + place * cache.token_stride) * cache.element;
    };
    const char* source = at(from);
    char* target = at(to);
    for (int64_t head = 0; head < cache.heads; ++head) {
        const int64_t offset = head * cache.head_stride * cache.element;
        if (cache.dim_stride == 1) {
            std::memmove(target + offset, source + offset, cache.dim * cache.element);
            continue;
        }
        for (int64_t d = 0; d < cache.dim; ++d) {
            const int64_t place = offset + d * cache.dim_stride * cache.element;
            std::memmove(target + place, source + place, cache.element);
        }
    }
}

void move_some(int thread, void* context) {
    const Moves& moves = *static_cast<Moves*>(context);
    const int64_t all = static_cast<int64_t>(moves.caches.size()) * moves.count;
    for (int64_t i = all * thread / moves.threads; i < all * (thread + 1) / moves.threads; ++i) {
        const int64_t move = i % moves.count;
        move_slot(moves.caches[i / moves.count], moves.sources[move], moves.targets[move]);
    }
}

}  // namespace

void move_kv(const std::vector<MovedPages>& caches, const int64_t* sources, const int64_t* targets, int64_t count,
             int threads, ParallelFor parallel) {
    if (count == 0 || caches.empty()) return;
    Moves moves{caches, sources, targets, count, threads};
    parallel(threads, move_some, &moves);
}

}  // namespace nld
