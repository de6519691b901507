// Finds the tokens of a tile in pages and among fresh tokens, prefetches them, and packs them, for one instruction set.
// Included only by tile_kernel.h.
#pragma once

#include <type_traits>

#include "tile_math.h"

namespace nld::NLD_ISA {

// Not the library's templates: all instruction sets would share the one copy that the linker keeps.
template <class T>
inline T least(T a, T b) {
    return b < a ? b : a;
}

// Location of `count` tokens of a tile, for one head: tokens and dimensions at any strides, in elements.
template <class T>
struct Run {
    const T* data;
    int64_t token, dim;
    int count;
    float scale;
    const Pages* tiles = nullptr;  // set if adjacent tokens or dimensions lie in groups

    // Address of one element, in tiles.
    const T* at(int t, int d) const {
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

// One pair (or single) of summed elements in the packed layout.
template <class Math, class T>
inline void put(typename Math::Element* to, const T* from, int64_t stride, bool second, float scale) {
    to[0] = element_of<Math>(from[0], scale);
    if constexpr (Math::kPair == 2) to[1] = second ? element_of<Math>(from[stride], scale) : typename Math::Element{};
}

// Packs two adjacent lines of the summed dimension, `count` pairs of elements that are contiguous in each.
template <class Math, class T>
inline void interleave(typename Math::Element* to, const T* a, const T* b, int count, float scale) {
    int i = 0;
#if defined(NLD_BFLOAT16_PAIRS)
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

// 16 adjacent pairs become two lines of 16 if products use single elements, and stay pairs otherwise.
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

// Tiles of 16 tokens by 2 dimensions (keys) or 2 tokens by 16 dimensions (values), the layout for AMX products. Partial
// tiles are copied element by element, because after the prefix a tile may hold anything.
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
    if (run.token == 1) {  // column-major pages: adjacent in memory and in the tile
        for (int d = 0; d < head_dim; d += kPair) {
            auto* to = keys + (d / kPair * kTile + place) * kPair;
            const T* from = run.data + d * run.dim;
            interleave<Math>(to, from, from + run.dim, run.count, run.scale);
        }
        return;
    }
    for (int t0 = 0; t0 < run.count; t0 += 8) {  // groups of 8, so that written lines stay in the L1 cache
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

// Calls use(run, place) for each run of tokens [first, first + count) of an item that is contiguous in memory.
template <class PageT, class FreshT, class Use>
inline void for_each_run(const BlockAttention& call, const Item& item, const Pages& pages, const Fresh& fresh, int head,
                         int first, int count, Use&& use) {
    const int end = first + count;
    for (int t = first; t < end;) {
        if (t < item.prefix) {
            const int page = t / call.page_size, place = t % call.page_size;
            const int n = least(least(call.page_size - place, item.prefix - t), end - t);
            const int64_t id = call.block_table[item.row * call.table_stride + page];
            // Tiles and pages begin at group boundaries, so runs do as well.
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

// Prefetches a tile's cache lines, a few at a time between products. Pages lie anywhere, hardware prefetchers do not
// follow block tables, and a core stalls if all lines are requested at once.
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

}  // namespace nld::NLD_ISA
