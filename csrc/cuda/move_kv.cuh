// move_kv: a CTA per (move, cache) copies one token's keys or values of all heads.
#pragma once

#include "nld_cuda.h"
#include "platform.cuh"

namespace nld {

constexpr int kMoveThreads = 128;

struct alignas(16) Bytes16 {
    uint32_t words[4];
};

NLD_HOST_DEVICE int64_t slot_offset(const NldCache& cache, int64_t slot, int page_size) {
    return slot / page_size * cache.strides[0] + slot % page_size * cache.strides[2];
}

// `per_unit` elements are moved at a time, as one Unit.
template <typename Unit>
NLD_DEVICE void move_token(const NldMoveKv& params, const NldCache& cache, int64_t source, int64_t target) {
    const int per_unit = static_cast<int>(sizeof(Unit)) / params.element_bytes;
    const int units = params.head_size / per_unit;
    char* pages = static_cast<char*>(cache.pages);
    const char* from = pages + slot_offset(cache, source, params.page_size) * params.element_bytes;
    char* to = pages + slot_offset(cache, target, params.page_size) * params.element_bytes;
    for (int i = thread_index(); i < params.kv_heads * units; i += kMoveThreads) {
        const int64_t element = i / units * cache.strides[1] + i % units * per_unit * cache.strides[3];
        const int64_t offset = element * params.element_bytes;
        *reinterpret_cast<Unit*>(to + offset) = *reinterpret_cast<const Unit*>(from + offset);
    }
}

NLD_KERNEL(kMoveThreads)
move_kv(const NLD_GRID_CONSTANT NldMoveKv params) {
    const int64_t source = params.sources[block_x()], target = params.targets[block_x()];
    if (source == target) return;
    const NldCache cache = params.caches[block_y()];
    if (params.vector_bytes == 16)
        move_token<Bytes16>(params, cache, source, target);
    else if (params.vector_bytes == 4)
        move_token<uint32_t>(params, cache, source, target);
    else if (params.vector_bytes == 2)
        move_token<uint16_t>(params, cache, source, target);
    else
        move_token<uint8_t>(params, cache, source, target);
}

}  // namespace nld
