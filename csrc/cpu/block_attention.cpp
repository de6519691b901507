// Division of work: all tiles, over items and KV heads, are put in one sequence. Each thread processes a contiguous
// range of equal cost, so that one long row and many short rows both use all cores.
//
//    item, KV head    0, 0               0, 1               1, 0               1, 1
//    tiles           | t0 | t1 | t2 |   | t0 | t1 | t2 |   | t0 | t1 | t2 |   | t0 | t1 | t2 |
//    threads         |<--------- 0 --------->|<--------- 1 --------->|<--------- 2 --------->|
//    cost            0 = item 0's start                    item 1's start                total
//
// Cost is counted in query rows. Where a range ends inside a head's tiles, the threads keep partial sums: thread 0 as
// its side 1 (it began item 0, head 1) and thread 1 as its side 0 (an earlier thread began it). After all tiles are
// done, merge() adds the side 0 of the following threads to a thread's side 1. One thread's memory:
//
//    | queries | keys | values | scores | accumulator, maxima, sums | ... of side 0 | ... of side 1 |
//      packed     one tile each           of the head it works on     Layout::partial() bytes each
#include "block_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

namespace nld {

namespace {

constexpr int kPackingCost = 24;  // packing a tile takes about as long as this many query rows
constexpr size_t kAlign = 64;
std::atomic<const Isa*> forced{nullptr};

size_t aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

void plan(const BlockAttention& call, std::vector<Item>& items) {
    items.clear();
    const int group = call.heads / call.kv_heads;
    const int chunk = std::max(1, kMaxQueries / group);
    int64_t start = 0;
    for (int row = 0; row < call.rows; ++row) {
        const int length = call.block_starts[row + 1] - call.block_starts[row];
        const int prefix = call.prefix_lens[row];
        for (int first = 0; first < length; first += chunk) {
            const int last = std::min(length, first + chunk);
            const int keys = prefix + (call.mask_kinds[row] == kCausal ? last : length);
            const int tiles = (keys + kTile - 1) / kTile;
            const int cost = (last - first) * group + kPackingCost;
            items.push_back({row, first, last, prefix, keys, tiles, cost, start});
            start += int64_t{tiles} * cost * call.kv_heads;
        }
    }
}

int64_t total_cost(const std::vector<Item>& items, int kv_heads) {
    const Item& item = items.back();
    return item.start + int64_t{item.tiles} * item.cost * kv_heads;
}

struct Layout {
    size_t queries, tile, scores, accumulator, maxima, sums;
    explicit Layout(int head_dim) {
        const size_t dim = padded_dim(head_dim), rows = kMaxQueries + kMostRows;
        queries = aligned(rows * dim * sizeof(float));
        tile = aligned(kTile * dim * sizeof(float));
        scores = aligned(kMostRows * kTile * sizeof(float));
        accumulator = queries;
        maxima = aligned(rows * sizeof(float));
        sums = aligned(rows * kSumLanes * sizeof(float));
    }
    size_t partial() const { return accumulator + maxima + sums; }
    size_t thread() const { return queries + 2 * tile + scores + 3 * partial(); }
};

struct Run {
    const BlockAttention& call;
    const Isa& isa;
    const std::vector<Item>& items;
    std::vector<Partial>& partials;  // two per thread: side 0 and side 1 of the picture above
    Layout layout;
    char* memory;
    int threads;

    Scratch scratch(int thread) const {
        char* at = memory + thread * layout.thread();
        auto take = [&at](size_t bytes) {
            char* here = at;
            at += bytes;
            return here;
        };
        Scratch s;
        s.queries = take(layout.queries);
        s.keys = take(layout.tile);
        s.values = take(layout.tile);
        s.scores = reinterpret_cast<float*>(take(layout.scores));
        s.accumulator = reinterpret_cast<float*>(take(layout.accumulator));
        s.maxima = reinterpret_cast<float*>(take(layout.maxima));
        s.sums = reinterpret_cast<float*>(take(layout.sums));
        return s;
    }

    char* partial_memory(int thread, int side) const {
        return memory + (thread + 1) * layout.thread() - (2 - side) * layout.partial();
    }
};

// First tile of an item, whose tiles begin at cost `base`, that starts at cost `place` or later.
int tile_at(const Item& item, int64_t base, int64_t place) {
    const int64_t tiles = (place - base + item.cost - 1) / item.cost;
    return static_cast<int>(std::clamp<int64_t>(place <= base ? 0 : tiles, 0, item.tiles));
}

void keep_partial(Run& run, int thread, int side, int item, int head, bool last, const Scratch& scratch) {
    const Item& it = run.items[item];
    Partial& partial = run.partials[2 * thread + side];
    char* memory = run.partial_memory(thread, side);
    partial.item = item;
    partial.head = head;
    partial.last = last;
    partial.queries = (it.last - it.first) * (run.call.heads / run.call.kv_heads);
    partial.accumulator = reinterpret_cast<float*>(memory);
    partial.maxima = reinterpret_cast<float*>(memory + run.layout.accumulator);
    partial.sums = reinterpret_cast<float*>(memory + run.layout.accumulator + run.layout.maxima);
    const size_t rows = partial.queries;
    std::memcpy(partial.accumulator, scratch.accumulator, rows * padded_dim(run.call.head_dim) * sizeof(float));
    std::memcpy(partial.maxima, scratch.maxima, rows * sizeof(float));
    std::memcpy(partial.sums, scratch.sums, rows * kSumLanes * sizeof(float));
}

void work(int thread, void* context) {
    Run& run = *static_cast<Run*>(context);
    const int heads = run.call.kv_heads;
    const int64_t total = total_cost(run.items, heads);
    const int64_t from = total * thread / run.threads, to = total * (thread + 1) / run.threads;
    const Scratch scratch = run.scratch(thread);
    auto begin = std::upper_bound(run.items.begin(), run.items.end(), from,
                                  [](int64_t place, const Item& item) { return place < item.start; });
    for (size_t index = begin - run.items.begin() - 1; index < run.items.size(); ++index) {
        const Item& item = run.items[index];
        const int64_t cost = int64_t{item.tiles} * item.cost;
        if (item.start >= to) break;
        const int skip = item.start >= from ? 0 : static_cast<int>((from - item.start) / cost);
        for (int head = skip; head < heads; ++head) {
            const int64_t base = item.start + head * cost;
            if (base >= to) break;
            const int first = tile_at(item, base, from), last = tile_at(item, base, to);
            if (first >= last) continue;
            run.isa.attend_tiles(run.call, item, head, first, last, scratch);
            if (first == 0 && last == item.tiles) {
                run.isa.write_out(run.call, item, head, scratch);
            } else {
                keep_partial(run, thread, first == 0 ? 1 : 0, static_cast<int>(index), head, last == item.tiles,
                             scratch);
            }
        }
    }
}

void add_partial(const Partial& part, const Scratch& into, int dim) {
    for (int q = 0; q < part.queries; ++q) {
        const float top = std::max(into.maxima[q], part.maxima[q]);
        const float own = std::exp2(into.maxima[q] - top), other = std::exp2(part.maxima[q] - top);
        float *acc = into.accumulator + q * dim, *sums = into.sums + q * kSumLanes;
        for (int d = 0; d < dim; ++d) acc[d] = acc[d] * own + part.accumulator[q * dim + d] * other;
        for (int i = 0; i < kSumLanes; ++i) sums[i] = sums[i] * own + part.sums[q * kSumLanes + i] * other;
        into.maxima[q] = top;
    }
}

// Combines the head that a thread left unfinished with the partial sums of the following threads, and writes it.
void merge(int thread, void* context) {
    Run& run = *static_cast<Run*>(context);
    const Partial& begun = run.partials[2 * thread + 1];
    if (begun.item < 0) return;
    Scratch sum = run.scratch(thread);
    sum.accumulator = begun.accumulator;
    sum.maxima = begun.maxima;
    sum.sums = begun.sums;
    for (int next = thread + 1; next < run.threads; ++next) {
        const Partial& part = run.partials[2 * next];
        if (part.item < 0) continue;  // a range without a tile
        add_partial(part, sum, padded_dim(run.call.head_dim));
        if (part.last) break;
    }
    run.isa.write_out(run.call, run.items[begun.item], begun.head, sum);
}

}  // namespace

void block_attention(const BlockAttention& call, int threads, ParallelFor parallel, Workspace& workspace) {
    plan(call, workspace.items);
    if (workspace.items.empty()) return;
    workspace.partials.assign(2 * threads, Partial{});
    Layout layout(call.head_dim);
    Run run{call,
            choose_isa(call.dtype),
            workspace.items,
            workspace.partials,
            layout,
            workspace.reserve(threads * layout.thread()),
            threads};
    parallel(threads, work, &run);
    const bool split =
        std::any_of(run.partials.begin(), run.partials.end(), [](const Partial& p) { return p.item >= 0; });
    if (split) parallel(threads, merge, &run);
}

const Isa& choose_isa(DType dtype) {
    const Isa* chosen = forced.load();
    if (chosen != nullptr && (!chosen->bfloat16_only || dtype == DType::kBFloat16)) return *chosen;
    for (const Isa& isa : instruction_sets()) {
        if (isa.preferred() && (!isa.bfloat16_only || dtype == DType::kBFloat16)) return isa;
    }
    return instruction_sets().back();
}

bool force_isa(const char* name) {
    if (*name == '\0') {
        forced = nullptr;
        return true;
    }
    for (const Isa& isa : instruction_sets()) {
        if (std::strcmp(isa.name, name) == 0 && isa.available()) {
            forced = &isa;
            return true;
        }
    }
    return false;
}

Workspace::~Workspace() { std::free(data_); }

char* Workspace::reserve(size_t bytes) {
    if (bytes > size_) {
        std::free(data_);
        data_ = static_cast<char*>(std::aligned_alloc(kAlign, aligned(bytes)));
        size_ = data_ == nullptr ? 0 : bytes;
        if (data_ == nullptr) throw std::bad_alloc();
    }
    return data_;
}

}  // namespace nld
