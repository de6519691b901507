// Registers the operators with torch through libtorch's stable ABI: one binary works with every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>
#include <tuple>

#include "accept_prefix.h"
#include "best_tokens.h"
#include "block_attention.h"

namespace {

// Raised with every change of a schema below or of what its arguments mean; cpp_ops.py compares it with its own number.
constexpr int64_t kAbiVersion = 2;

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

nld::DType dtype_of(const Tensor& tensor, const char* op, const char* name, bool may_be_float8) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            return nld::DType::kFloat32;
        case ScalarType::BFloat16:
            return nld::DType::kBFloat16;
        case ScalarType::Half:
            return nld::DType::kFloat16;
        case ScalarType::Float8_e4m3fn:
            STD_TORCH_CHECK(may_be_float8, op, ": ", name, " is float8; allowed: float32, bfloat16, float16");
            return nld::DType::kFloat8E4M3;
        case ScalarType::Float8_e5m2:
            STD_TORCH_CHECK(may_be_float8, op, ": ", name, " is float8; allowed: float32, bfloat16, float16");
            return nld::DType::kFloat8E5M2;
        default:
            STD_TORCH_CHECK(false, op, ": dtype of ", name, " is not supported; allowed: float32, bfloat16, float16",
                            may_be_float8 ? ", float8" : "");
    }
    return nld::DType::kFloat32;
}

nld::Fresh fresh(const Tensor& tensor, const char* name, int64_t tokens, int64_t heads, int64_t head_dim) {
    STD_TORCH_CHECK(tensor.dim() == 3, "block_attention: ", name, " has ", tensor.dim(), " dimensions; needed: 3");
    STD_TORCH_CHECK(tensor.size(0) == tokens && tensor.size(1) == heads && tensor.size(2) == head_dim,
                    "block_attention: ", name, " has shape [", tensor.size(0), ", ", tensor.size(1), ", ",
                    tensor.size(2), "]; needed: [", tokens, ", ", heads, ", ", head_dim, "]");
    STD_TORCH_CHECK(tensor.stride(2) == 1, "block_attention: ", name, " has inner stride ", tensor.stride(2),
                    "; needed: 1");
    return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1)};
}

int64_t page_size(const Tensor& pool) { return pool.dim() == 6 ? pool.size(2) * pool.size(3) : pool.size(2); }

// Whole pages, or tiles in pages: [pages, kv_heads, groups, tokens of a group, groups, dimensions of a group].
nld::Pages pages(const Tensor& tensor, const char* name, int64_t kv_heads, int64_t head_dim, double scale) {
    const bool tiled = tensor.dim() == 6;
    STD_TORCH_CHECK(tensor.dim() == 4 || tiled, "block_attention: ", name, " has ", tensor.dim(),
                    " dimensions; needed: 4, or 6 in tiles");
    const int64_t dims = tiled ? tensor.size(4) * tensor.size(5) : tensor.size(3);
    const int64_t size = page_size(tensor);
    STD_TORCH_CHECK(tensor.size(1) == kv_heads && dims == head_dim && size > 0, "block_attention: ", name,
                    " has shape [pages, ", tensor.size(1), ", ", size, ", ", dims, "]; needed: [pages, ", kv_heads,
                    ", page size, ", head_dim, "]");
    nld::Pages found{tensor.data_ptr(),
                     dtype_of(tensor, "block_attention", name, true),
                     tensor.stride(0),
                     tensor.stride(1),
                     tensor.stride(tiled ? 3 : 2),
                     tensor.stride(tiled ? 5 : 3),
                     static_cast<float>(scale)};
    if (!tiled) return found;
    STD_TORCH_CHECK(nld::kTile % tensor.size(3) == 0 && tensor.size(5) % 2 == 0, "block_attention: tiles of ", name,
                    " are of ", tensor.size(3), " tokens by ", tensor.size(5),
                    " dimensions; allowed: divisors of 64 by even numbers");
    found.tokens = static_cast<int>(tensor.size(3));
    found.dims = static_cast<int>(tensor.size(5));
    found.token_group = tensor.stride(2);
    found.dim_group = tensor.stride(4);
    return found;
}

const int32_t* ints(const Tensor& tensor, const char* name, int64_t dims, int64_t size) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int, "block_attention: ", name, " must be int32");
    STD_TORCH_CHECK(tensor.dim() == dims && tensor.size(0) == size, "block_attention: ", name, " must have ", dims,
                    " dimension(s), the first of size ", size);
    STD_TORCH_CHECK(tensor.size(dims - 1) <= 1 || tensor.stride(dims - 1) == 1, "block_attention: ", name,
                    " must be contiguous in its last dimension");
    return static_cast<const int32_t*>(tensor.data_ptr());
}

// Checks all values that a kernel trusts: lengths, page ids, mask kinds.
void check_rows(const nld::BlockAttention& call, int64_t tokens, int64_t pages_per_row, int64_t pages) {
    STD_TORCH_CHECK(call.block_starts[0] >= 0, "block_attention: block_starts[0] is ", call.block_starts[0],
                    "; allowed: 0 or more");
    for (int row = 0; row < call.rows; ++row) {
        const int64_t length = int64_t{call.block_starts[row + 1]} - call.block_starts[row];
        STD_TORCH_CHECK(length >= 0 && call.block_starts[row + 1] <= tokens, "block_attention: block_starts[", row + 1,
                        "] is ", call.block_starts[row + 1], "; allowed: ", call.block_starts[row], " to ", tokens);
        const int64_t prefix = call.prefix_lens[row];
        STD_TORCH_CHECK(prefix >= 0 && prefix <= pages_per_row * call.page_size, "block_attention: prefix_lens[", row,
                        "] is ", prefix, "; allowed: 0 to ", pages_per_row * call.page_size, " (", pages_per_row,
                        " pages of ", call.page_size, ")");
        for (int64_t i = 0; i * call.page_size < prefix; ++i) {
            const int32_t page = call.block_table[row * call.table_stride + i];
            STD_TORCH_CHECK(page >= 0 && page < pages, "block_attention: block_table[", row, ", ", i, "] is ", page,
                            "; allowed: 0 to ", pages - 1);
        }
        const int32_t kind = call.mask_kinds[row];
        STD_TORCH_CHECK(kind == nld::kAll || kind == nld::kCausal, "block_attention: mask_kinds[", row, "] is ", kind,
                        "; allowed: 0 (all), 1 (causal)");
    }
}

void run_in_parallel(int count, void (*body)(int, void*), void* context) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) body(static_cast<int>(i), context);
    });
}

void block_attention(Tensor query, Tensor key, Tensor value, Tensor key_pages, Tensor value_pages, Tensor block_table,
                     Tensor prefix_lens, Tensor block_starts, Tensor mask_kinds, double scale, double k_scale,
                     double v_scale, int64_t, int64_t, Tensor output) {
    STD_TORCH_CHECK(query.dim() == 3, "block_attention: query has ", query.dim(), " dimensions; needed: 3");
    STD_TORCH_CHECK(key.dim() == 3, "block_attention: key has ", key.dim(), " dimensions; needed: 3");
    STD_TORCH_CHECK(prefix_lens.dim() == 1, "block_attention: prefix_lens must have 1 dimension(s)");
    STD_TORCH_CHECK(scale > 0, "block_attention: scale is ", scale, "; allowed: more than 0");
    const int64_t tokens = query.size(0), heads = query.size(1), dim = query.size(2), kv_heads = key.size(1);
    const int64_t rows = prefix_lens.size(0);
    STD_TORCH_CHECK(heads > 0 && kv_heads > 0 && heads % kv_heads == 0 && heads / kv_heads <= nld::kMaxQueries,
                    "block_attention: ", heads, " query heads and ", kv_heads,
                    " KV heads; allowed: a multiple, at most ", nld::kMaxQueries);
    STD_TORCH_CHECK(dim >= 16 && dim <= 256 && dim % 16 == 0, "block_attention: head size is ", dim,
                    "; allowed: multiples of 16 up to 256");
    nld::BlockAttention call;
    call.dtype = dtype_of(query, "block_attention", "query", false);
    for (const auto& [tensor, name] : {std::pair{&key, "key"}, {&value, "value"}, {&output, "output"}})
        STD_TORCH_CHECK(tensor->scalar_type() == query.scalar_type(), "block_attention: dtype of ", name,
                        " differs from the query's");
    call.rows = static_cast<int>(rows);
    call.heads = static_cast<int>(heads);
    call.kv_heads = static_cast<int>(kv_heads);
    call.head_dim = static_cast<int>(dim);
    call.query = fresh(query, "query", tokens, heads, dim);
    call.key = fresh(key, "key", tokens, kv_heads, dim);
    call.value = fresh(value, "value", tokens, kv_heads, dim);
    call.output = fresh(output, "output", tokens, heads, dim);
    call.key_pages = pages(key_pages, "key_pages", kv_heads, dim, k_scale);
    call.value_pages = pages(value_pages, "value_pages", kv_heads, dim, v_scale);
    STD_TORCH_CHECK(key_pages.size(0) == value_pages.size(0) && page_size(key_pages) == page_size(value_pages) &&
                        call.key_pages.dtype == call.value_pages.dtype,
                    "block_attention: key_pages and value_pages differ in shape or dtype");
    const bool quantized = call.key_pages.dtype >= nld::DType::kFloat8E4M3;
    STD_TORCH_CHECK(quantized || call.key_pages.dtype == call.dtype,
                    "block_attention: dtype of key_pages is neither the query's nor float8");
    if (!quantized) call.key_pages.scale = call.value_pages.scale = 1.0f;
    call.page_size = static_cast<int>(page_size(key_pages));
    call.block_table = ints(block_table, "block_table", 2, rows);
    call.table_stride = block_table.stride(0);
    call.prefix_lens = ints(prefix_lens, "prefix_lens", 1, rows);
    call.block_starts = ints(block_starts, "block_starts", 1, rows + 1);
    call.mask_kinds = ints(mask_kinds, "mask_kinds", 1, rows);
    call.scale = static_cast<float>(scale);
    check_rows(call, tokens, block_table.size(1), key_pages.size(0));
    // The workspace lives as long as the calling thread. An engine calls from one thread.
    thread_local nld::Workspace workspace;
    nld::block_attention(call, static_cast<int>(torch::stable::get_num_threads()), run_in_parallel, workspace);
}

std::tuple<Tensor, Tensor, Tensor> best_tokens(Tensor logits, bool with_normalizer) {
    STD_TORCH_CHECK(logits.dim() == 2, "best_tokens: logits has ", logits.dim(), " dimensions; needed: 2");
    const int64_t rows = logits.size(0), vocab = logits.size(1);
    STD_TORCH_CHECK(vocab > 0, "best_tokens: logits has no columns; needed: 1 or more");
    STD_TORCH_CHECK(vocab == 1 || logits.stride(1) == 1, "best_tokens: logits has inner stride ", logits.stride(1),
                    "; needed: 1");
    Tensor tokens = torch::stable::new_empty(logits, {rows}, ScalarType::Long),
           largest = torch::stable::new_empty(logits, {rows}, ScalarType::Float),
           normalizers = torch::stable::new_empty(logits, {with_normalizer ? rows : 0}, ScalarType::Float);
    nld::BestTokens call;
    call.logits = logits.data_ptr();
    call.dtype = dtype_of(logits, "best_tokens", "logits", false);
    call.rows = rows, call.vocab = vocab, call.row_stride = logits.stride(0);
    call.tokens = static_cast<int64_t*>(tokens.data_ptr());
    call.largest = static_cast<float*>(largest.data_ptr());
    call.normalizers = with_normalizer ? static_cast<float*>(normalizers.data_ptr()) : nullptr;
    nld::best_tokens(call, static_cast<int>(torch::stable::get_num_threads()), run_in_parallel);
    return {tokens, largest, normalizers};
}

int64_t abi_version() { return kAbiVersion; }

std::string instruction_set(std::string force) {
    STD_TORCH_CHECK(nld::force_isa(force.c_str()), "instruction_set: '", force, "' is not available on this machine");
    return nld::choose_isa(nld::DType::kBFloat16).name;
}

const int64_t* longs(const Tensor& tensor, const char* op, const char* name) {
    STD_TORCH_CHECK(
        tensor.scalar_type() == ScalarType::Long && tensor.dim() == 1 && (tensor.size(0) <= 1 || tensor.stride(0) == 1),
        op, ": ", name, " must be a contiguous int64 vector");
    return static_cast<const int64_t*>(tensor.data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> accept_prefix(Tensor drafts, Tensor targets, Tensor starts) {
    STD_TORCH_CHECK(starts.scalar_type() == ScalarType::Int && starts.dim() == 1 && starts.size(0) >= 1 &&
                        (starts.size(0) == 1 || starts.stride(0) == 1),
                    "accept_prefix: starts must be a contiguous int32 vector of rows + 1 entries");
    const int64_t rows = starts.size(0) - 1, count = drafts.dim() == 1 ? drafts.size(0) : -1;
    nld::AcceptPrefix call;
    call.rows = static_cast<int>(rows);
    call.drafts = longs(drafts, "accept_prefix", "drafts");
    call.targets = longs(targets, "accept_prefix", "targets");
    call.starts = static_cast<const int32_t*>(starts.data_ptr());
    STD_TORCH_CHECK(targets.size(0) == count + rows, "accept_prefix: targets has ", targets.size(0),
                    " entries; needed: ", count + rows, " (one a draft and one a row)");
    STD_TORCH_CHECK(call.starts[0] == 0 && call.starts[rows] == count, "accept_prefix: starts must go from 0 to ",
                    count);
    for (int64_t row = 0; row < rows; ++row)
        STD_TORCH_CHECK(call.starts[row] <= call.starts[row + 1], "accept_prefix: starts[", row + 1, "] is ",
                        call.starts[row + 1], "; allowed: ", call.starts[row], " or more");
    Tensor accepted = torch::stable::new_empty(starts, {rows}),
           token_starts = torch::stable::new_empty(starts, {rows + 1});
    Tensor tokens = torch::stable::new_empty(targets, {count + rows}),
           seeds = torch::stable::new_empty(targets, {rows});
    call.accepted = static_cast<int32_t*>(accepted.data_ptr());
    call.token_starts = static_cast<int32_t*>(token_starts.data_ptr());
    call.tokens = static_cast<int64_t*>(tokens.data_ptr());
    call.seeds = static_cast<int64_t*>(seeds.data_ptr());
    nld::accept_prefix(call);
    return {accepted, tokens, token_starts, seeds};
}

}  // namespace

STABLE_TORCH_LIBRARY(vllm_nld_cpu, m) {
    m.def(
        "block_attention(Tensor query, Tensor key, Tensor value, Tensor key_pages, Tensor value_pages, Tensor "
        "block_table, "
        "Tensor prefix_lens, Tensor block_starts, Tensor mask_kinds, float scale, float k_scale, "
        "float v_scale, int max_length, int max_prefix, Tensor(a!) output) -> ()");
    m.def("best_tokens(Tensor logits, bool with_normalizer=True) -> (Tensor, Tensor, Tensor)");
    m.def("accept_prefix(Tensor drafts, Tensor targets, Tensor starts) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def("instruction_set(str force) -> str");
    m.def("abi_version() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_nld_cpu, CPU, m) {
    m.impl("block_attention", TORCH_BOX(&block_attention));
    m.impl("best_tokens", TORCH_BOX(&best_tokens));
    m.impl("accept_prefix", TORCH_BOX(&accept_prefix));
}

STABLE_TORCH_LIBRARY_IMPL(vllm_nld_cpu, CompositeExplicitAutograd, m) {
    m.impl("instruction_set", TORCH_BOX(&instruction_set));
    m.impl("abi_version", TORCH_BOX(&abi_version));
}
