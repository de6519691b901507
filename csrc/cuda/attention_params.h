// Parameters of the attention kernels, and data that the launcher's parts exchange.
#pragma once

#include "nld_cuda.h"
#include "plan.h"

namespace nld {

// How a tile is copied to shared memory.
enum LoadPath {
    kLoadAsync = 0,   // 16 bytes at a time by cp.async: same type, contiguous, aligned
    kLoadFloat8 = 1,  // one chunk of float8 at a time, converted: contiguous, aligned
    kLoadScalar = 2,  // element by element, any strides
};

// A tensor's first element and its strides in bytes.
struct TokenView {
    const char* base;
    int64_t token;
    int64_t head;
    LoadPath path;
};
struct PageView {
    const char* base;
    int64_t page;
    int64_t head;
    int64_t slot;
    int64_t element;
    LoadPath path;
};

struct AttentionParams {
    TokenView query;
    TokenView key;
    TokenView value;
    PageView key_pages;
    PageView value_pages;
    char* output;
    int64_t output_token;  // strides in elements
    int64_t output_head;
    bool output_pairs;  // two elements may be written at once
    const int32_t* block_table;
    int64_t block_table_stride;
    const int32_t* prefix_lens;
    const int32_t* block_starts;
    const int32_t* mask_kinds;
    int group;
    int head_size;
    int page_size;
    int page_shift;
    int cache_type;      // NldType
    float fresh_scale;   // of scores, for base 2
    float prefix_scale;  // with k_scale, unless there are k_scales
    float v_scale;
    const float* k_scales;  // of each KV head; null: prefix_scale and v_scale are of all
    const float* v_scales;
    int64_t k_scales_stride;
    int64_t v_scales_stride;
    int splits;
    Workspace workspace;
    float* partials;  // null without splits
};

struct LaunchPlan {
    int rows;
    int kv_heads;
    int m_tile;  // folded queries per CTA
    int m_tiles;
    int padded_head;
    int splits;
    int shared_bytes;
};

// Each instantiated in a file of its own; they return a cudaError_t.
template <typename T>
int launch_mma(const AttentionParams& params, const LaunchPlan& plan, cudaStream_t stream);
int launch_fma(const AttentionParams& params, const LaunchPlan& plan, cudaStream_t stream);
int launch_merge(const AttentionParams& params, const LaunchPlan& plan, int type, cudaStream_t stream);

}  // namespace nld
