// Attention over tiles of 64 keys, for one instruction set: define NLD_ISA (a namespace) and NLD_LANES, then include.
//
// Per item: pack the queries once. Per tile: pack 64 keys and values so that a product reads them in order, then for a
// few query rows at a time: scores = Q K^T, online softmax, accumulator += P V. Keys and values come from cache pages
// and from the fresh tokens, which continue the prefix.
#pragma once

#include "tile_math.h"
#include "tile_pack.h"

namespace nld::NLD_ISA {

// Number of keys that a query attends to, counted from the start of the prefix.
inline int64_t keys_seen(const BlockAttention& call, const Item& item, int query) {
    if (call.mask_kinds[item.row] == kCausal) return int64_t{item.prefix} + query + 1;
    return int64_t{item.prefix} + call.block_starts[item.row + 1] - call.block_starts[item.row];
}

// Mask of the 64 keys from `first` on that a query attends to.
inline uint64_t visible(const BlockAttention& call, const Item& item, int query, int first) {
    const int64_t n = keys_seen(call, item, query) - first;
    return n <= 0 ? 0 : n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
}

// Whether all of the item's queries see all keys of the tile; under either mask the first query sees the fewest.
inline bool all_visible(const BlockAttention& call, const Item& item, int first) {
    return first + kTile <= keys_seen(call, item, item.first);
}

// Turns the scores of up to kRows queries into probabilities, and rescales the accumulator where a maximum grew.
template <class Math>
inline void softmax(float* scores, int rows, float scale, float* maxima, float* sums, float* accumulator, int dim) {
    constexpr int kVectors = kTile / kLanes;
    for (int i = 0; i < rows; ++i) {
        float* row = scores + i * kTile;
        Vec top = load(row);
#pragma GCC unroll 16
        for (int j = 1; j < kVectors; ++j) top = vmax(top, load(row + j * kLanes));
        const float old = maxima[i], peak = reduce_max(top) * scale, now = peak > old ? peak : old;
        if (now > old) {
            maxima[i] = now;
            const Vec shrink = exp2<6>(splat(old - now));
            for (int j = 0; j < kSumLanes; j += kLanes)
                store(sums + i * kSumLanes + j, load(sums + i * kSumLanes + j) * shrink);
            float* acc = accumulator + i * dim;
            for (int d = 0; d < dim; d += kLanes) store(acc + d, load(acc + d) * shrink);
        }
        // Probabilities overwrite the scores that they are made of, because they never take more space.
        auto* out = reinterpret_cast<typename Math::Element*>(row);
        Vec sum{};
#pragma GCC unroll 16
        for (int j = 0; j < kVectors; ++j) {
            const Vec p = exp2<Math::kTerms>(load(row + j * kLanes) * scale - now);
            sum += p;
            Math::store(out + j * kLanes, p);
        }
        store(sums + i * kSumLanes, load(sums + i * kSumLanes) + sum);
    }
}

template <class Math, class PageT, class FreshT>
struct Kernel {
    using Element = typename Math::Element;
    static constexpr int kRows = Math::kRows, kPair = Math::kPair;
    static constexpr float kLowest = -1e30f;  // finite, so that a row without visible keys has no NaN

    static int queries_of(const BlockAttention& call, const Item& item) {
        return (item.last - item.first) * (call.heads / call.kv_heads);
    }

    static void load_queries(const BlockAttention& call, const Item& item, int head, const Scratch& s) {
        const int group = call.heads / call.kv_heads, dim = padded_dim(call.head_dim);
        const int count = queries_of(call, item), padded = (count + kRows - 1) / kRows * kRows;
        std::memset(s.queries, 0, sizeof(Element) * padded * dim);
        for (int q = 0; q < count; ++q) {
            auto* to = static_cast<Element*>(s.queries) + q / kRows * kRows * dim + q % kRows * kPair;
            const int64_t token = call.block_starts[item.row] + item.first + q / group;
            const FreshT* from = static_cast<const FreshT*>(call.query.data) + token * call.query.token +
                                 (head * group + q % group) * call.query.head;
            for (int d = 0; d < call.head_dim; ++d)
                to[d / kPair * kRows * kPair + d % kPair] = element_of<Math>(from[d], 1.0f);
        }
        for (int q = 0; q < padded; ++q) s.maxima[q] = kLowest;
        std::memset(s.sums, 0, sizeof(float) * padded * kSumLanes);
        std::memset(s.accumulator, 0, sizeof(float) * padded * dim);
    }

    static void load_tile(const BlockAttention& call, const Item& item, int head, int first, const Scratch& s) {
        const int count = least(kTile, item.keys - first), dim = padded_dim(call.head_dim);
        auto *keys = static_cast<Element*>(s.keys), *values = static_cast<Element*>(s.values);
        if (count < kTile) {  // rows after the last key are also multiplied, by a probability of 0
            std::memset(static_cast<void*>(keys), 0, sizeof(Element) * kTile * dim);
            std::memset(static_cast<void*>(values), 0, sizeof(Element) * kTile * dim);
        }
        for_each_run<PageT, FreshT>(
            call, item, call.key_pages, call.key, head, first, count,
            [&](const auto& run, int place) { pack_keys<Math>(keys, place, run, call.head_dim); });
        for_each_run<PageT, FreshT>(
            call, item, call.value_pages, call.value, head, first, count,
            [&](const auto& run, int place) { pack_values<Math>(values, place, run, call.head_dim, dim); });
    }

    static Prefetcher next_tile(const BlockAttention& call, const Item& item, int head, int first, bool is_last) {
        Prefetcher next;
        if (is_last) return next;
        const int count = least(kTile, item.keys - first);
        auto add = [&](const auto& run, int) { next.add(run, call.head_dim); };
        for_each_run<PageT, FreshT>(call, item, call.key_pages, call.key, head, first, count, add);
        for_each_run<PageT, FreshT>(call, item, call.value_pages, call.value, head, first, count, add);
        return next;
    }

    static void attend_tile(const BlockAttention& call, const Item& item, int first, Prefetcher next,
                            const Scratch& s) {
        const int count = queries_of(call, item), group = call.heads / call.kv_heads, dim = padded_dim(call.head_dim);
        const float scale = call.scale * 1.44269504089f;
        const bool masked = !all_visible(call, item, first);
        const auto *queries = static_cast<const Element*>(s.queries), *keys = static_cast<const Element*>(s.keys),
                   *values = static_cast<const Element*>(s.values);
        const int lines = next.lines() * kRows / count + 1;
        // Skip absent keys in the last tile: their scores are masked and their probabilities 0.
        const int present = least(kTile, item.keys - first);
        const int columns = (present + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
        for (int q = 0; q < count; q += kRows) {
            const int rows = least(kRows, count - q);
            next.ask(lines);
            for (int column = 0; column < columns; column += 2 * kLanes)
                multiply<Math, false, kPair, kRows * kPair>(queries + q * dim, keys + column * kPair, kTile,
                                                            call.head_dim / kPair, s.scores + column, kTile);
            if (masked) hide(call, item, q, rows, group, first, s.scores);
            float* accumulator = s.accumulator + q * dim;
            softmax<Math>(s.scores, rows, scale, s.maxima + q, s.sums + q * kSumLanes, accumulator, dim);
            for (int column = 0; column < dim; column += 2 * kLanes)
                multiply<Math, true, kTile * sizeof(float) / sizeof(Element), kPair>(
                    reinterpret_cast<const Element*>(s.scores), values + column * kPair, dim,
                    (present + kPair - 1) / kPair, accumulator + column, dim);
        }
    }

    static void hide(const BlockAttention& call, const Item& item, int q, int rows, int group, int first,
                     float* scores) {
        for (int i = 0; i < rows; ++i) {
            const uint64_t bits = visible(call, item, item.first + (q + i) / group, first);
            for (int j = 0; j < kTile; j += kLanes) {
                float* at = scores + i * kTile + j;
                store(at, keep_visible(load(at), static_cast<uint32_t>(bits >> j)));
            }
        }
    }

    static void attend_tiles(const BlockAttention& call, const Item& item, int head, int first, int last,
                             const Scratch& s) {
        load_queries(call, item, head, s);
        if (call.head_dim % 32 != 0)  // columns after head_dim are computed and dropped
            std::memset(s.values, 0, sizeof(Element) * kTile * padded_dim(call.head_dim));
        std::memset(s.scores, 0, sizeof(float) * kMostRows * kTile);
        for (int tile = first; tile < last; ++tile) {
            load_tile(call, item, head, tile * kTile, s);
            attend_tile(call, item, tile * kTile, next_tile(call, item, head, (tile + 1) * kTile, tile + 1 == last), s);
        }
    }

    static void write_out(const BlockAttention& call, const Item& item, int head, const Scratch& s) {
        const int group = call.heads / call.kv_heads, dim = padded_dim(call.head_dim), count = queries_of(call, item);
        for (int q = 0; q < count; ++q) {
            float sum = 0;
            for (int i = 0; i < kSumLanes; ++i) sum += s.sums[q * kSumLanes + i];
            const float factor = sum > 0 ? 1 / sum : (sum == 0 ? 0.0f : sum);  // a NaN stays one
            const int64_t token = call.block_starts[item.row] + item.first + q / group;
            FreshT* to = static_cast<FreshT*>(call.output.data) + token * call.output.token +
                         (head * group + q % group) * call.output.head;
            for (int d = 0; d < call.head_dim; ++d) to[d] = from_float<FreshT>(s.accumulator[q * dim + d] * factor);
        }
    }
};

// Picks the instance for the call's dtypes.
template <class Math, class FreshT, class Do>
void with_page_type(const BlockAttention& call, Do&& run) {
    switch (call.key_pages.dtype) {
        case DType::kFloat8E4M3:
            return run(Kernel<Math, E4M3, FreshT>{});
        case DType::kFloat8E5M2:
            return run(Kernel<Math, E5M2, FreshT>{});
        default:
            return run(Kernel<Math, FreshT, FreshT>{});
    }
}

template <class Do>
void with_kernel(const BlockAttention& call, Do&& run) {
#if defined(NLD_BFLOAT16_PAIRS)  // used for no other dtype
    return with_page_type<BFloat16Math, BFloat16>(call, run);
#else
    switch (call.dtype) {
        case DType::kFloat32:
            return with_page_type<Float32Math, float>(call, run);
        case DType::kFloat16:
            return with_page_type<Float32Math, Half>(call, run);
        default:
            return with_page_type<Float32Math, BFloat16>(call, run);
    }
#endif
}

inline void attend_tiles(const BlockAttention& call, const Item& item, int head, int first, int last,
                         const Scratch& s) {
    with_kernel(call, [&](auto kernel) { kernel.attend_tiles(call, item, head, first, last, s); });
}

inline void write_out(const BlockAttention& call, const Item& item, int head, const Scratch& s) {
    with_kernel(call, [&](auto kernel) { kernel.write_out(call, item, head, s); });
}

}  // namespace nld::NLD_ISA
