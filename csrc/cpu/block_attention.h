// Block-bidirectional paged attention on CPUs: arguments, division of work, and entry point.
// Independent of torch: bindings.cpp fills the structs, and the sanitizer tests use the same entry point.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace nld {

struct BestTokens;
struct BestPart;

enum class DType : int8_t { kFloat32, kBFloat16, kFloat16, kFloat8E4M3, kFloat8E5M2 };

// Fresh tokens: [tokens, heads, head_dim] with inner stride 1; strides in elements.
struct Fresh {
    void* data;
    int64_t token, head;
};

// A view of the cache: [pages, kv_heads, page_size, head_dim], any strides, in elements. In tiled pages tokens lie in
// groups of `tokens`, and dimensions in groups of `dims`, with strides of their own. In other pages these are zero.
struct Pages {
    const void* data;
    DType dtype;
    int64_t page, head, token, dim;
    float scale;
    int tokens = 0, dims = 0;
    int64_t token_group = 0, dim_group = 0;
    bool tiled() const { return tokens > 0; }
};

enum MaskKind : int32_t { kAll = 0, kCausal = 1 };

// One call. docs/developer/operators.md says what the tensors mean.
struct BlockAttention {
    DType dtype;  // of query, key, value and output
    int rows, heads, kv_heads, head_dim, page_size;
    Fresh query, key, value, output;
    Pages key_pages, value_pages;
    const int32_t* block_table;
    int64_t table_stride;
    const int32_t* prefix_lens;
    const int32_t* block_starts;
    const int32_t* mask_kinds;
    float scale;  // > 0
};

// Consecutive query tokens of one row, and all keys that they attend to: first the prefix, then fresh tokens.
struct Item {
    int row, first, last;  // tokens of the block
    int prefix, keys;
    int tiles, cost;  // cost of one tile, in query rows
    int64_t start;    // cost of all items before it, over all KV heads
};

constexpr int kTile = 64;  // keys that are multiplied at once; packed keys and values of a tile fit the L1 cache

// Most query rows (tokens times grouped heads) of an item, so that its accumulators and queries fit the L2 cache.
constexpr int kMaxQueries = 256;

// Most rows of a micro kernel, and lanes of the sum of a query's probabilities (one vector of the widest ISA).
constexpr int kMostRows = 16, kSumLanes = 16;

// Working memory of one thread. All pointers are 64-byte aligned.
struct Scratch {
    void* queries;  // packed [queries / rows of the micro kernel][padded head_dim / pair][rows][pair]
    void* keys;     // one packed tile
    void* values;
    float* scores;       // [rows of the micro kernel, kTile]
    float* accumulator;  // [queries, padded head_dim]
    float* maxima;       // [queries], in units of log2
    float* sums;         // [queries, kSumLanes], not yet added up
};

// A thread's partial result for a head of an item that other threads also work on.
struct Partial {
    int item = -1, head = 0, queries = 0;
    bool last = false;  // the item ends here
    float *accumulator, *maxima, *sums;
};

// Attends to the tiles [first, last) of an item, for one KV head, with one instruction set.
using AttendFunction = void (*)(const BlockAttention&, const Item&, int head, int first, int last, const Scratch&);
// Divides by the sums and writes the output.
using WriteFunction = void (*)(const BlockAttention&, const Item&, int head, const Scratch&);

// Search one segment of one row of logits (best_tokens.h).
using SegmentFunction = void (*)(const BestTokens&, int64_t row, int64_t segment, BestPart&);

struct Isa {
    const char* name;
    bool (*available)();  // this CPU can run it
    bool (*preferred)();  // available, and at least as fast as the next entry
    bool bfloat16_only;
    AttendFunction attend_tiles;
    WriteFunction write_out;
    SegmentFunction segment;
};

// All that were compiled in, the fastest first.
const std::vector<Isa>& instruction_sets();

// The instruction set that calls of this dtype use.
const Isa& choose_isa(DType dtype);

// Use only the named one (for tests and benchmarks). An empty name restores the default. False if unavailable.
bool force_isa(const char* name);

// Runs body(0) .. body(count - 1), each exactly once, possibly at the same time.
using ParallelFor = void (*)(int count, void (*body)(int, void*), void* context);

// Memory that is kept between calls, so that a call allocates only if it is the largest so far.
class Workspace {
  public:
    Workspace() = default;
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
    ~Workspace();
    char* reserve(size_t bytes);  // 64-byte aligned; throws std::bad_alloc
    std::vector<Item> items;
    std::vector<Partial> partials;

  private:
    char* data_ = nullptr;
    size_t size_ = 0;
};

// Compute one call with `threads` threads. Deterministic for a given number of threads.
void block_attention(const BlockAttention& call, int threads, ParallelFor parallel, Workspace& workspace);

inline int padded_dim(int head_dim) { return (head_dim + 31) / 32 * 32; }

}  // namespace nld
