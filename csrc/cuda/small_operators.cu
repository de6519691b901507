// The launchers of accept_prefix and best_tokens, and the rest of the interface.
#include <initializer_list>

#include "accept_prefix.cuh"
#include "best_tokens.cuh"
#include "plan.h"

int nld_accept_prefix(const NldAcceptPrefix* call, cudaStream_t stream) {
    if (call == nullptr || call->starts == nullptr || call->token_starts == nullptr) return NLD_NULL_POINTER;
    if (call->rows < 0 || call->drafts_total < 0) return NLD_BAD_SHAPE;
    if (call->rows > 0)
        for (const void* pointer : {static_cast<const void*>(call->targets), static_cast<const void*>(call->accepted),
                                    static_cast<const void*>(call->tokens), static_cast<const void*>(call->seeds)})
            if (pointer == nullptr) return NLD_NULL_POINTER;
    if (call->drafts_total > 0 && call->drafts == nullptr) return NLD_NULL_POINTER;
    const int shared_bytes = (nld::kAcceptWarps + 1) * static_cast<int>(sizeof(int));
    return nld::launch(nld::accept_prefix, 1, 1, 1, nld::kAcceptThreads, shared_bytes, stream, *call);
}

int nld_best_tokens_workspace(const NldBestTokens* call, size_t* bytes) {
    if (call == nullptr || bytes == nullptr) return NLD_NULL_POINTER;
    if (call->rows < 0 || call->vocab < 1) return NLD_BAD_SHAPE;
    const size_t segments = static_cast<size_t>(nld::ceil_div(call->vocab, nld::kBestSegment));
    if (segments > 65535) return NLD_TOO_MANY;
    *bytes = static_cast<size_t>(call->rows) * segments * sizeof(nld::BestPart);
    return NLD_OK;
}

namespace {

using BestKernel = void (*)(nld::BestParams);

template <typename T>
BestKernel best_segment_kernel(bool with_normalizer) {
    return with_normalizer ? nld::best_segment<T, true> : nld::best_segment<T, false>;
}

BestKernel best_segment_kernel(int type, bool with_normalizer) {
    switch (type) {
        case NLD_FLOAT32:
            return best_segment_kernel<float>(with_normalizer);
        case NLD_BFLOAT16:
            return best_segment_kernel<nld::BFloat16>(with_normalizer);
        case NLD_FLOAT16:
            return best_segment_kernel<nld::Float16>(with_normalizer);
        default:
            return nullptr;
    }
}

}  // namespace

int nld_best_tokens(const NldBestTokens* call, cudaStream_t stream) {
    size_t bytes = 0;
    const int status = nld_best_tokens_workspace(call, &bytes);
    if (status != NLD_OK) return status;
    const BestKernel segment_kernel = best_segment_kernel(call->type, call->normalizers != nullptr);
    if (segment_kernel == nullptr) return NLD_BAD_TYPE;
    if (call->rows == 0) return NLD_OK;
    if (call->logits == nullptr || call->tokens == nullptr || call->largest == nullptr || call->workspace == nullptr)
        return NLD_NULL_POINTER;
    if (call->workspace_bytes < bytes) return NLD_SMALL_WORKSPACE;
    const int64_t row_bytes = call->row_stride * (call->type == NLD_FLOAT32 ? 4 : 2);
    const bool aligned = (static_cast<int64_t>(reinterpret_cast<uintptr_t>(call->logits)) | row_bytes) % 16 == 0;
    const int segments = nld::ceil_div(call->vocab, nld::kBestSegment);
    const nld::BestParams params = {call->logits, call->row_stride, static_cast<nld::BestPart*>(call->workspace),
                                    call->tokens, call->largest,    call->normalizers,
                                    call->vocab,  segments,         aligned};
    const int shared_bytes = nld::kBestWarps * static_cast<int>(sizeof(nld::BestPart));
    const int launched =
        nld::launch(segment_kernel, call->rows, segments, 1, nld::kBestThreads, shared_bytes, stream, params);
    return launched != NLD_OK ? launched : nld::launch(nld::best_row, call->rows, 1, 1, 32, 0, stream, params);
}

const char* nld_cuda_message(int status) {
    switch (status) {
        case NLD_OK:
            return "no error";
        case NLD_BAD_TYPE:
            return "no such type, or types that do not go together";
        case NLD_BAD_SHAPE:
            return "a size is out of range";
        case NLD_NULL_POINTER:
            return "a pointer is missing";
        case NLD_SMALL_WORKSPACE:
            return "the workspace is smaller than the operator's own _workspace function asks for";
        case NLD_SHARED_MEMORY:
            return "the device has too little shared memory for this head size";
        case NLD_TOO_MANY:
            return "more rows, heads or tokens than a grid can have";
        default:
            return nld::device_message(status);
    }
}

int nld_cuda_abi_version(void) { return 3; }

int nld_cuda_emulated(void) { return nld::kEmulated; }
