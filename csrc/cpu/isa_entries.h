// Entry points of one instruction set, in its namespace: define NLD_ISA and NLD_LANES, then include, in a file of its
// own that is compiled for that instruction set. NLD_LANES decides which intrinsics are used, because the compiler
// flags may allow more.
#pragma once

#include "best_tokens_kernel.h"
#include "instruction_sets.h"
#include "tile_kernel.h"

namespace nld::NLD_ISA {

void run_attend_tiles(const BlockAttention& call, const Item& item, int head, int first, int last,
                      const Scratch& scratch) {
    attend_tiles(call, item, head, first, last, scratch);
}

void run_write_out(const BlockAttention& call, const Item& item, int head, const Scratch& scratch) {
    write_out(call, item, head, scratch);
}

void run_segment(const BestTokens& call, int64_t row, int64_t segment, BestPart& part) {
    search_segment(call, row, segment, part);
}

}  // namespace nld::NLD_ISA
