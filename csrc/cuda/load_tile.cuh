// Loads a tile from global to shared memory. Absent rows and columns become zeros, because unused slots of a page may
// hold NaN, and NaN times a weight of 0 would be NaN.
#pragma once

#include "attention_params.h"
#include "platform.cuh"
#include "smem.h"

namespace nld {

// Consecutive tokens of one KV head, in pages or end to end.
struct TokenSource {
    const char* base;  // of the head; bytes from here on
    int64_t page;
    int64_t slot;
    int64_t element;
    const int32_t* table;  // null: not paged
    int page_size;
    int page_shift;
    int first;
    int end;
    LoadPath path;
    int type;  // NldType of float8 elements, otherwise unused

    NLD_DEVICE bool exists(int row) const { return first + row < end; }
    NLD_DEVICE const char* address(int row) const {
        const int token = first + row;
        if (table == nullptr) return base + token * slot;
        const PageSlot place = page_slot(token, page_size, page_shift);
        return base + table[place.column] * page + place.slot * slot;
    }
};

// Folded queries of one KV head.
struct QuerySource {
    const char* base;  // of the row's first token and the group's first head
    int64_t token;
    int64_t head;
    int64_t element;
    int group;
    int first;
    int end;
    LoadPath path;
    static constexpr int type = NLD_FLOAT32;

    NLD_DEVICE bool exists(int row) const { return first + row < end; }
    NLD_DEVICE const char* address(int row) const {
        const FoldedQuery query = unfold(first + row, group);
        return base + query.token * token + query.member * head;
    }
};

NLD_DEVICE TokenSource prefix_source(const PageView& pages, const AttentionParams& params, int row, int kv_head,
                                     const Tile& tile) {
    return {pages.base + kv_head * pages.head,
            pages.page,
            pages.slot,
            pages.element,
            params.block_table + row * params.block_table_stride,
            params.page_size,
            params.page_shift,
            tile.first,
            tile.end,
            pages.path,
            params.cache_type};
}

NLD_DEVICE TokenSource fresh_source(const TokenView& view, int element_bytes, int start, int kv_head,
                                    const Tile& tile) {
    return {view.base + start * view.token + kv_head * view.head,
            0,
            view.token,
            element_bytes,
            nullptr,
            1,
            0,
            tile.first,
            tile.end,
            view.path,
            NLD_FLOAT32};
}

NLD_DEVICE float float_from_float8(uint8_t bits, int type) {
    return type == NLD_FLOAT8_E4M3 ? float_from_e4m3(bits) : float_from_e5m2(bits);
}

template <typename T>
NLD_DEVICE T read_element(const char* address, int type) {
    if (type == NLD_FLOAT8_E4M3 || type == NLD_FLOAT8_E5M2)
        return from_float<T>(float_from_float8(*reinterpret_cast<const uint8_t*>(address), type));
    return *reinterpret_cast<const T*>(address);
}

struct alignas(16) Chunk {
    uint32_t words[4];
};

// A chunk's worth of float8 (8 for 16-bit elements, 4 for float32), aligned.
template <typename T>
NLD_DEVICE Chunk convert_float8(const char* address, int type) {
    constexpr int kWords = 4 / static_cast<int>(sizeof(T));  // of float8
    Chunk chunk;
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
        const uint32_t four = reinterpret_cast<const uint32_t*>(address)[word];
        float values[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i] = float_from_float8(static_cast<uint8_t>(four >> (8 * i)), type);
        if constexpr (sizeof(T) == 2) {
            chunk.words[2 * word] = pack<T>(values[0], values[1]);
            chunk.words[2 * word + 1] = pack<T>(values[2], values[3]);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) chunk.words[i] = bits_from_float(values[i]);
        }
    }
    return chunk;
}

// All threads of the block copy kRows rows. The caller must commit and await asynchronous copies, and synchronize the
// threads.
template <typename T, int kHead, int kRows, int kThreads, typename Source>
NLD_DEVICE void load_tile(char* tile, const Source& source, int head_size) {
    using Layout = TileLayout<T, kHead>;
    constexpr int kTotal = kRows * Layout::kChunks;
    static_assert(kTotal % kThreads == 0, "every thread copies equally many chunks");
    [[maybe_unused]] constexpr int kUnroll = kHead > 192 ? 1 : 4;  // addresses at once; more would take more registers
    const int thread = thread_index();
    if (source.path == kLoadAsync) {
#pragma unroll kUnroll
        for (int i = 0; i < kTotal / kThreads; ++i) {
            const int row = (thread + i * kThreads) / Layout::kChunks,
                      chunk = (thread + i * kThreads) % Layout::kChunks;
            const bool valid = source.exists(row) && chunk * Layout::kChunk < head_size;
            const char* from = valid ? source.address(row) + 16 * chunk : source.base;
            copy_async_16(tile + Layout::offset(row, chunk), from, valid);
        }
        return;
    }
#pragma unroll 1
    for (int index = thread; index < kTotal; index += kThreads) {
        const int row = index / Layout::kChunks, chunk = index % Layout::kChunks;
        Chunk* to = reinterpret_cast<Chunk*>(tile + Layout::offset(row, chunk));
        if (!source.exists(row) || chunk * Layout::kChunk >= head_size) {
            *to = Chunk{};
            continue;
        }
        const char* from = source.address(row) + chunk * Layout::kChunk * source.element;
        if (source.path == kLoadFloat8) {
            *to = convert_float8<T>(from, source.type);
            continue;
        }
#pragma unroll 1
        for (int i = 0; i < Layout::kChunk; ++i)
            reinterpret_cast<T*>(to)[i] = read_element<T>(from + i * source.element, source.type);
    }
}

}  // namespace nld
