// The CUDA operators of vllm-nld: plain C interface, no torch. docs/developer/operators.md says what they compute.
//
// Every function enqueues work on the given stream and returns at once: it neither waits, allocates nor throws. Grids
// depend only on host-side numbers (rows, max_length, max_prefix, ...), so calls can be captured in a CUDA graph.
#pragma once

#include <stddef.h>
#include <stdint.h>

typedef struct CUstream_st* cudaStream_t;  // the same declaration as in cuda_runtime_api.h

#ifdef __cplusplus
extern "C" {
#endif

enum NldType { NLD_FLOAT32 = 0, NLD_BFLOAT16 = 1, NLD_FLOAT16 = 2, NLD_FLOAT8_E4M3 = 3, NLD_FLOAT8_E5M2 = 4 };

// Return values of functions: 0, one of these, or (positive) a cudaError_t.
enum NldError {
    NLD_OK = 0,
    NLD_BAD_TYPE = -1,
    NLD_BAD_SHAPE = -2,
    NLD_NULL_POINTER = -3,
    NLD_SMALL_WORKSPACE = -4,
    NLD_SHARED_MEMORY = -5,
    NLD_TOO_MANY = -6,
};

// Strides count elements. Inner dimensions without a stride are contiguous.
struct NldBlockAttention {
    const void* query;         // [T, H, D]
    const void* key;           // [T, Hkv, D]
    const void* value;         // [T, Hkv, D]
    void* output;              // [T, H, D]
    int64_t query_strides[2];  // token, head
    int64_t key_strides[2];
    int64_t value_strides[2];
    int64_t output_strides[2];
    const void* key_pages;        // [P, Hkv, S, D]
    const void* value_pages;      // [P, Hkv, S, D]
    int64_t key_page_strides[4];  // page, head, slot, element
    int64_t value_page_strides[4];
    const int32_t* block_table;  // [R, M]
    int64_t block_table_stride;
    const int32_t* prefix_lens;   // [R]
    const int32_t* block_starts;  // [R + 1]
    const int32_t* mask_kinds;    // [R], 0 all (bidirectional) or 1 causal
    int32_t rows;                 // R
    int32_t heads;                // H
    int32_t kv_heads;             // Hkv
    int32_t head_size;            // D
    int32_t page_size;            // S
    int32_t max_length;
    int32_t max_prefix;
    int32_t type;        // NldType of query, key, value, output: not a float8 one
    int32_t cache_type;  // NldType of the pages: type, or a float8 one
    float scale;
    float k_scale;
    float v_scale;
    const float* k_scales;  // [Hkv], in place of k_scale; or null, as are then v_scales
    const float* v_scales;
    int64_t k_scales_stride;
    int64_t v_scales_stride;
    int32_t split_limit;  // most splits of a prefix; 0: the operator chooses
    void* workspace;      // device memory, aligned to 16 bytes; may be null if no bytes are needed
    size_t workspace_bytes;
};

// Bytes of workspace that nld_block_attention needs with these shapes on the current device. Reads no pointer.
int nld_block_attention_workspace(const struct NldBlockAttention* call, size_t* bytes);
int nld_block_attention(const struct NldBlockAttention* call, cudaStream_t stream);

struct NldAcceptPrefix {
    const int64_t* drafts;   // [N]
    const int64_t* targets;  // [N + R]
    const int32_t* starts;   // [R + 1]
    int32_t* accepted;       // [R]
    int64_t* tokens;         // [N + R]
    int32_t* token_starts;   // [R + 1]
    int64_t* seeds;          // [R]
    int32_t rows;            // R
    int32_t drafts_total;    // N
};

int nld_accept_prefix(const struct NldAcceptPrefix* call, cudaStream_t stream);

struct NldBestTokens {
    const void* logits;  // [rows, vocab], inner stride 1
    int64_t row_stride;  // counts elements
    int64_t* tokens;     // [rows]
    float* largest;      // [rows]
    float* normalizers;  // [rows], or null if not needed
    int32_t rows;
    int32_t vocab;
    int32_t type;     // NldType of the logits: not a float8 one
    void* workspace;  // device memory, aligned to 16 bytes
    size_t workspace_bytes;
};

// Bytes of workspace that nld_best_tokens needs with these shapes. Reads no pointer.
int nld_best_tokens_workspace(const struct NldBestTokens* call, size_t* bytes);
int nld_best_tokens(const struct NldBestTokens* call, cudaStream_t stream);

// A static text for a return value of the functions above.
const char* nld_cuda_message(int status);

// Raised with every change of a function or struct above; vllm_nld/ops/cuda_ops.py compares it with its own number.
int nld_cuda_abi_version(void);

// 1 when this library is the emulation on the CPU that the tests build (tests/kernels/cuda_host), 0 when it is CUDA.
int nld_cuda_emulated(void);

#ifdef __cplusplus
}
#endif
