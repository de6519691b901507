// Attention over tiles of 64 keys, for one instruction set: define NLD_ISA (a namespace) and NLD_LANES, then include.
//
// Per item: pack the queries once. Per tile: pack 64 keys and values so that a product reads them in order, then for a
// few query rows at a time: scores = Q K^T, online softmax, accumulator += P V. Keys and values come from cache pages
// and from the fresh tokens, which simply continue the prefix.
#pragma once

#include <type_traits>

#include "block_attention.h"
#include "convert.h"
#include "vector.h"

namespace nld::NLD_ISA {

// Products in float32: operands are converted when they are packed.
struct Float32Math {
    using Element = float;
    using Operand = Vec;
    static constexpr int kPair = 1;  // elements of the summed dimension that lie side by side
    static constexpr int kTerms = 6;
#if defined(__AVX512F__)
    static constexpr int kRows = 8;
#else
    static constexpr int kRows = 4;
#endif
    static Operand load(const float* p) { return NLD_ISA::load(p); }
    static Operand broadcast(const float* p) { return splat(*p); }
    static Vec add(Vec sum, Operand a, Operand b) { return sum + a * b; }
    static float element(float x) { return x; }
    static void store(float* p, Vec v) { NLD_ISA::store(p, v); }
};

#if defined(__AVX512BF16__)
// Products of bfloat16 pairs, summed in float32.
struct BFloat16Math {
    using Element = BFloat16;
    using Operand = __m512bh;
    static constexpr int kPair = 2;
    static constexpr int kTerms = 4;  // probabilities are rounded to 8 bits anyway
    static constexpr int kRows = 8;
    static Operand load(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static Operand broadcast(const BFloat16* p) {
        int32_t pair;
        std::memcpy(&pair, p, 4);
        return (__m512bh)_mm512_set1_epi32(pair);
    }
    static Vec add(Vec sum, Operand a, Operand b) { return _mm512_dpbf16_ps(sum, a, b); }
    static BFloat16 element(float x) { return to_bfloat16(x); }
    static BFloat16 element(BFloat16 x) { return x; }
    static void store(BFloat16* p, Vec v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
    }
};
#endif

// c[kRows][2 vectors] (+)= a[kRows][steps * kPair] * b, where b is packed [steps][width][kPair]. Rows and steps of a
// lie kRow and kStep elements apart, known when compiled: a loop that computes addresses asks for more loads than
// products.
template <class Math, bool kAdd, int kRow, int kStep>
inline void multiply(const typename Math::Element* a, const typename Math::Element* b, int width, int steps, float* c,
                     int c_stride) {
    constexpr int kRows = Math::kRows, kPair = Math::kPair;
    Vec sum[kRows][2];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
        sum[i][0] = kAdd ? load(c + i * c_stride) : Vec{};
        sum[i][1] = kAdd ? load(c + i * c_stride + kLanes) : Vec{};
    }
    for (int step = 0; step < steps; ++step) {
        const auto left = Math::load(b), right = Math::load(b + kLanes * kPair);
        b += width * kPair;
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
            const auto factor = Math::broadcast(a + i * kRow);
            sum[i][0] = Math::add(sum[i][0], factor, left);
            sum[i][1] = Math::add(sum[i][1], factor, right);
        }
        a += kStep;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
        store(c + i * c_stride, sum[i][0]);
        store(c + i * c_stride + kLanes, sum[i][1]);
    }
}

// The library's templates would be shared by all instruction sets, compiled for whichever the linker keeps.
template <class T>
inline T least(T a, T b) {
    return b < a ? b : a;
}

// Where `count` tokens of a tile lie, one head of them: tokens and dimensions at any strides, in elements.
template <class T>
struct Run {
    const T* data;
    int64_t token, dim;
    int count;
    float scale;
    const Pages* tiles = nullptr;  // set where neighbouring tokens or dimensions lie in groups

    const T* at(int t, int d) const {
        if (tiles == nullptr) return data + t * token + d * dim;
        return data + t / tiles->tokens * tiles->token_group + t % tiles->tokens * token +
               d / tiles->dims * tiles->dim_group + d % tiles->dims * dim;
    }
};

template <class Math, class T>
inline typename Math::Element element_of(T x, float scale) {
    if constexpr (std::is_same_v<T, typename Math::Element>) {
        return x;
    } else {
        return Math::element(to_float(x) * scale);
    }
}

// One pair (or single) of summed elements, as the packed layout holds it.
template <class Math, class T>
inline void put(typename Math::Element* to, const T* from, int64_t stride, bool second, float scale) {
    to[0] = element_of<Math>(from[0], scale);
    if constexpr (Math::kPair == 2) to[1] = second ? element_of<Math>(from[stride], scale) : typename Math::Element{};
}

// Packs two neighbouring lines of the summed dimension, `count` pairs of elements that are contiguous in each.
template <class Math, class T>
inline void interleave(typename Math::Element* to, const T* a, const T* b, int count, float scale) {
    int i = 0;
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<T, BFloat16>) {
        const __m512i low =
            _mm512_set_epi32(0x2f000f + 0, 0x2e000e, 0x2d000d, 0x2c000c, 0x2b000b, 0x2a000a, 0x290009, 0x280008,
                             0x270007, 0x260006, 0x250005, 0x240004, 0x230003, 0x220002, 0x210001, 0x200000);
        const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        for (; i + 32 <= count; i += 32) {
            const __m512i first = _mm512_loadu_si512(a + i), second = _mm512_loadu_si512(b + i);
            _mm512_storeu_si512(to + 2 * i, _mm512_permutex2var_epi16(first, low, second));
            _mm512_storeu_si512(to + 2 * i + 32, _mm512_permutex2var_epi16(first, high, second));
        }
    }
#endif
    for (; i < count; ++i) {
        to[i * Math::kPair] = element_of<Math>(a[i], scale);
        if constexpr (Math::kPair == 2) to[2 * i + 1] = element_of<Math>(b[i], scale);
    }
}

// 16 pairs that lie together become two lines of 16 where products are of single elements, and stay pairs otherwise.
template <class Math, class T>
inline void unzip(const T* from, typename Math::Element* first, typename Math::Element* second, float scale) {
    if constexpr (Math::kPair == 2) {
        for (int i = 0; i < 32; ++i) first[i] = element_of<Math>(from[i], scale);
    } else {
        for (int i = 0; i < 16; ++i) {
            first[i] = element_of<Math>(from[2 * i], scale);
            second[i] = element_of<Math>(from[2 * i + 1], scale);
        }
    }
}

// Tiles of 16 tokens by 2 dimensions (keys) or 2 tokens by 16 dimensions (values), as AMX products want them. What is
// no whole tile is copied element by element: behind the prefix, a tile may hold anything.
template <class Math, class T>
void pack_tiled_keys(typename Math::Element* keys, int place, const Run<T>& run, int head_dim) {
    constexpr int kPair = Math::kPair;
    const Pages& tiles = *run.tiles;
    const bool whole = tiles.tokens == 16 && tiles.dims == 2 && run.token == 2 && run.dim == 1;
    for (int t = 0; t < run.count;) {
        const int n = whole && t + 16 <= run.count ? 16 : 1;
        for (int d = 0; d < head_dim; d += 2) {
            auto* to = keys + (d / kPair * kTile + place + t) * kPair;
            auto* next = kPair == 2 ? to + 1 : to + kTile;
            if (n == 16) {
                unzip<Math>(run.at(t, d), to, next, run.scale);
            } else {
                *to = element_of<Math>(*run.at(t, d), run.scale);
                *next = element_of<Math>(*run.at(t, d + 1), run.scale);
            }
        }
        t += n;
    }
}

template <class Math, class T>
void pack_tiled_values(typename Math::Element* values, int place, const Run<T>& run, int head_dim, int width) {
    constexpr int kPair = Math::kPair;
    const Pages& tiles = *run.tiles;
    const bool whole = tiles.tokens == 2 && tiles.dims == 16 && run.token == 1 && run.dim == 2;
    for (int t = 0; t < run.count;) {
        const int n = whole && (place + t) % 2 == 0 && t + 2 <= run.count ? 2 : 1, row = place + t;
        auto* to = values + row / kPair * width * kPair + row % kPair;
        for (int d = 0; d < head_dim; d += n == 2 ? 16 : 1) {
            if (n == 2) {
                unzip<Math>(run.at(t, d), to + d * kPair, to + width + d, run.scale);
            } else {
                to[d * kPair] = element_of<Math>(*run.at(t, d), run.scale);
                if (kPair == 2 && row % 2 == 0) to[d * kPair + 1] = typename Math::Element{};
            }
        }
        t += n;
    }
}

// keys[dim / kPair][kTile][kPair], from column `place` on. The summed dimension is the head's.
template <class Math, class T>
void pack_keys(typename Math::Element* keys, int place, const Run<T>& run, int head_dim) {
    constexpr int kPair = Math::kPair;
    if (run.tiles != nullptr) return pack_tiled_keys<Math>(keys, place, run, head_dim);
    if (run.token == 1) {  // column-major pages: neighbours in memory are neighbours in the tile
        for (int d = 0; d < head_dim; d += kPair) {
            auto* to = keys + (d / kPair * kTile + place) * kPair;
            const T* from = run.data + d * run.dim;
            interleave<Math>(to, from, from + run.dim, run.count, run.scale);
        }
        return;
    }
    for (int t0 = 0; t0 < run.count; t0 += 8) {  // by eights: what is written stays in the L1 cache
        const int t1 = least(run.count, t0 + 8);
        for (int d = 0; d < head_dim; d += kPair) {
            auto* to = keys + (d / kPair * kTile + place) * kPair;
            const T* from = run.data + d * run.dim;
            for (int t = t0; t < t1; ++t) put<Math>(to + t * kPair, from + t * run.token, run.dim, true, run.scale);
        }
    }
}

// values[kTile / kPair][width][kPair], from row `place` on. The summed dimension is the tokens'.
template <class Math, class T>
void pack_values(typename Math::Element* values, int place, const Run<T>& run, int head_dim, int width) {
    constexpr int kPair = Math::kPair;
    if (run.tiles != nullptr) return pack_tiled_values<Math>(values, place, run, head_dim, width);
    int t = 0;
    if (place % kPair != 0) {  // the other half of a pair that another run began
        auto* to = values + (place / kPair) * width * kPair + 1;
        for (int d = 0; d < head_dim; ++d) to[d * kPair] = element_of<Math>(run.data[d * run.dim], run.scale);
        t = 1;
    }
    for (; t < run.count; t += kPair) {
        auto* to = values + ((place + t) / kPair) * width * kPair;
        const T* from = run.data + t * run.token;
        const bool second = t + 1 < run.count;
        if (run.dim == 1 && (second || kPair == 1)) {
            interleave<Math>(to, from, from + run.token, head_dim, run.scale);
        } else {
            for (int d = 0; d < head_dim; ++d)
                put<Math>(to + d * kPair, from + d * run.dim, run.token, second, run.scale);
        }
    }
}

// Calls use(run, place) for each stretch of tokens [first, first + count) of an item that lies together in memory.
template <class PageT, class FreshT, class Use>
inline void for_each_run(const BlockAttention& call, const Item& item, const Pages& pages, const Fresh& fresh, int head,
                         int first, int count, Use&& use) {
    const int end = first + count;
    for (int t = first; t < end;) {
        if (t < item.prefix) {
            const int page = t / call.page_size, place = t % call.page_size;
            const int n = least(least(call.page_size - place, item.prefix - t), end - t);
            const int64_t id = call.block_table[item.row * call.table_stride + page];
            // Tiles and pages begin where groups do, so a run does, too.
            const int64_t offset = pages.tiled() ? place / pages.tokens * pages.token_group : place * pages.token;
            const PageT* data = static_cast<const PageT*>(pages.data) + id * pages.page + head * pages.head + offset;
            use(Run<PageT>{data, pages.token, pages.dim, n, pages.scale, pages.tiled() ? &pages : nullptr}, t - first);
            t += n;
        } else {
            const int64_t token = call.block_starts[item.row] + (t - item.prefix);
            const FreshT* data = static_cast<const FreshT*>(fresh.data) + token * fresh.token + head * fresh.head;
            use(Run<FreshT>{data, fresh.token, 1, end - t, 1.0f}, t - first);
            t = end;
        }
    }
}

// Asks for a tile's lines in memory, a few at a time between products: pages lie anywhere, hardware prefetchers do not
// follow block tables, and a core waits if it is asked for all at once.
class Prefetcher {
  public:
    template <class T>
    void add(const Run<T>& run, int head_dim) {
        if (count_ == kMost) return;
        if (run.tiles != nullptr) {
            const Pages& tiles = *run.tiles;
            if (tiles.token_group > tiles.dim_group) {
                stretch(run.data, tiles.token_group, (run.count + tiles.tokens - 1) / tiles.tokens,
                        tiles.tokens * head_dim);
            } else {
                stretch(run.data, tiles.dim_group, head_dim / tiles.dims, run.count * tiles.dims);
            }
        } else if (run.token == 1) {
            stretch(run.data, run.dim, head_dim, run.count);
        } else {
            stretch(run.data, run.token, run.count, head_dim);
        }
    }

    int lines() const { return lines_; }

    void ask(int lines) {
        while (lines > 0 && at_ < count_) {
            const Stretch& stretch = stretches_[at_];
            for (; line_ < stretch.lines && lines > 0; ++line_, --lines) {
                const char* data = stretch.data + line_ * stretch.stride;
                for (int byte = 0; byte < stretch.bytes; byte += 64) __builtin_prefetch(data + byte, 0, 2);
            }
            if (line_ < stretch.lines) return;
            line_ = 0;
            ++at_;
        }
    }

  private:
    static constexpr int kMost = 16;
    struct Stretch {
        const char* data;
        int64_t stride;
        int lines, bytes;
    };

    // `lines` times `length` elements, `stride` elements apart.
    template <class T>
    void stretch(const T* data, int64_t stride, int lines, int length) {
        stretches_[count_++] = {reinterpret_cast<const char*>(data), stride * static_cast<int64_t>(sizeof(T)), lines,
                                length * static_cast<int>(sizeof(T))};
        lines_ += lines;
    }

    Stretch stretches_[kMost];
    int count_ = 0, lines_ = 0, at_ = 0, line_ = 0;
};

// Which of the 64 keys from `first` on a query sees.
inline uint64_t visible(const BlockAttention& call, const Item& item, int query, int first) {
    auto below = [](int64_t n) { return n <= 0 ? 0 : n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; };
    const uint64_t prefix = below(int64_t{item.prefix} - first);
    const int length = call.block_starts[item.row + 1] - call.block_starts[item.row];
    switch (call.mask_kinds[item.row]) {
        case kAll:
            return below(int64_t{item.prefix} + length - first);
        case kCausal:
            return below(int64_t{item.prefix} + query + 1 - first);
        default:
            break;
    }
    uint64_t bits = prefix;
    const int32_t* words = call.mask_words + int64_t{call.block_starts[item.row] + query} * call.mask_width;
    for (int i = 0; i < 64; ++i) {
        const int token = first + i - item.prefix;
        if (token < 0 || token >= length || token / 32 >= call.mask_width) continue;
        bits |= uint64_t{(static_cast<uint32_t>(words[token / 32]) >> (token % 32)) & 1} << i;
    }
    return bits;
}

inline bool all_visible(const BlockAttention& call, const Item& item, int first) {
    const int length = call.block_starts[item.row + 1] - call.block_starts[item.row];
    switch (call.mask_kinds[item.row]) {
        case kAll:
            return first + kTile <= item.prefix + length;
        case kCausal:
            return first + kTile <= item.prefix + item.first + 1;
        default:
            return first + kTile <= item.prefix;
    }
}

// Turns the scores of up to kRows queries into probabilities, and rescales what was accumulated where a maximum rose.
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
            for (int j = 0; j < 16; j += kLanes) store(sums + i * 16 + j, load(sums + i * 16 + j) * shrink);
            float* acc = accumulator + i * dim;
            for (int d = 0; d < dim; d += kLanes) store(acc + d, load(acc + d) * shrink);
        }
        // Probabilities take the place of the scores that they come from: they are never larger.
        auto* out = reinterpret_cast<typename Math::Element*>(row);
        Vec sum{};
#pragma GCC unroll 16
        for (int j = 0; j < kVectors; ++j) {
            const Vec p = exp2<Math::kTerms>(load(row + j * kLanes) * scale - now);
            sum += p;
            Math::store(out + j * kLanes, p);
        }
        store(sums + i * 16, load(sums + i * 16) + sum);
    }
}

template <class Math, class PageT, class FreshT>
struct Kernel {
    using Element = typename Math::Element;
    static constexpr int kRows = Math::kRows, kPair = Math::kPair, kStrips = kMaxStrip / kRows;
    static constexpr float kLowest = -1e30f;  // finite, so that a row that sees nothing yet stays free of NaN

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
        std::memset(s.sums, 0, sizeof(float) * padded * 16);
        std::memset(s.accumulator, 0, sizeof(float) * padded * dim);
    }

    static void load_tile(const BlockAttention& call, const Item& item, int head, int first, const Scratch& s) {
        const int count = least(kTile, item.keys - first), dim = padded_dim(call.head_dim);
        auto *keys = static_cast<Element*>(s.keys), *values = static_cast<Element*>(s.values);
        if (count < kTile) {  // what lies behind the last key is multiplied, too, by a probability of zero
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

    static void attend(const BlockAttention& call, const Item& item, int first, Prefetcher next, const Scratch& s) {
        const int count = queries_of(call, item), group = call.heads / call.kv_heads, dim = padded_dim(call.head_dim);
        const float scale = call.scale * 1.44269504089f;
        const bool masked = !all_visible(call, item, first);
        const auto *queries = static_cast<const Element*>(s.queries), *keys = static_cast<const Element*>(s.keys),
                   *values = static_cast<const Element*>(s.values);
        const int lines = next.lines() * kRows / count + 1;
        for (int q = 0; q < count; q += kRows * kStrips) {
            const int rows = least(kRows * kStrips, count - q), strips = (rows + kRows - 1) / kRows;
            for (int column = 0; column < kTile; column += 2 * kLanes)
                for (int i = 0; i < strips; ++i)
                    multiply<Math, false, kPair, kRows * kPair>(queries + (q + i * kRows) * dim, keys + column * kPair,
                                                                kTile, call.head_dim / kPair,
                                                                s.scores + i * kRows * kTile + column, kTile);
            next.ask(lines * strips);
            if (masked) hide(call, item, q, rows, group, first, s.scores);
            float* accumulator = s.accumulator + q * dim;
            softmax<Math>(s.scores, rows, scale, s.maxima + q, s.sums + q * 16, accumulator, dim);
            for (int column = 0; column < dim; column += 2 * kLanes)
                for (int i = 0; i < strips; ++i)
                    multiply<Math, true, kTile * sizeof(float) / sizeof(Element), kPair>(
                        reinterpret_cast<const Element*>(s.scores + i * kRows * kTile), values + column * kPair, dim,
                        kTile / kPair, accumulator + i * kRows * dim + column, dim);
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

    static void piece(const BlockAttention& call, const Item& item, int head, int first, int last, const Scratch& s) {
        load_queries(call, item, head, s);
        if (call.head_dim % 32 != 0)  // columns behind the head's dimensions are computed, and dropped
            std::memset(s.values, 0, sizeof(Element) * kTile * padded_dim(call.head_dim));
        std::memset(s.scores, 0, sizeof(float) * kMaxStrip * kTile);
        for (int tile = first; tile < last; ++tile) {
            load_tile(call, item, head, tile * kTile, s);
            attend(call, item, tile * kTile, next_tile(call, item, head, (tile + 1) * kTile, tile + 1 == last), s);
        }
    }

    static void finish(const BlockAttention& call, const Item& item, int head, const Scratch& s) {
        const int group = call.heads / call.kv_heads, dim = padded_dim(call.head_dim), count = queries_of(call, item);
        for (int q = 0; q < count; ++q) {
            float sum = 0;
            for (int i = 0; i < 16; ++i) sum += s.sums[q * 16 + i];
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
#if defined(__AVX512BF16__)  // chosen for no other dtype
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

inline void piece(const BlockAttention& call, const Item& item, int head, int first, int last, const Scratch& s) {
    with_kernel(call, [&](auto kernel) { kernel.piece(call, item, head, first, last, s); });
}

inline void finish(const BlockAttention& call, const Item& item, int head, const Scratch& s) {
    with_kernel(call, [&](auto kernel) { kernel.finish(call, item, head, s); });
}

}  // namespace nld::NLD_ISA
