#define NLD_ISA avx512bf16
#define NLD_LANES 16
#include "best_tokens_kernel.h"
#include "instruction_sets.h"
#include "tile_kernel.h"

namespace nld::avx512bf16 {

void run_piece(const BlockAttention& call, const Item& item, int head, int first, int last, const Scratch& scratch) {
    piece(call, item, head, first, last, scratch);
}

void run_finish(const BlockAttention& call, const Item& item, int head, const Scratch& scratch) {
    finish(call, item, head, scratch);
}

void run_segment(const BestTokens& call, int64_t row, int64_t segment, BestPart& part) {
    search_segment(call, row, segment, part);
}

}  // namespace nld::avx512bf16
