// What one instruction set offers, in its namespace: define NLD_ISA and NLD_LANES, then include, in a file of its own
// that is compiled for that instruction set. NLD_LANES says which intrinsics there are: the compiler may be told of
// more.
#pragma once

#include "best_tokens_kernel.h"
#include "instruction_sets.h"
#include "tile_kernel.h"

namespace nld::NLD_ISA {

void run_piece(const BlockAttention& call, const Item& item, int head, int first, int last, const Scratch& scratch) {
    piece(call, item, head, first, last, scratch);
}

void run_finish(const BlockAttention& call, const Item& item, int head, const Scratch& scratch) {
    finish(call, item, head, scratch);
}

void run_segment(const BestTokens& call, int64_t row, int64_t segment, BestPart& part) {
    search_segment(call, row, segment, part);
}

}  // namespace nld::NLD_ISA
