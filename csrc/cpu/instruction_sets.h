// Entry points of each isa_*.cpp, which is compiled with its own flags.
#pragma once

#include "block_attention.h"

#define NLD_DECLARE_ISA(name)                                                                 \
    namespace nld::name {                                                                     \
    void run_attend_tiles(const BlockAttention&, const Item&, int, int, int, const Scratch&); \
    void run_write_out(const BlockAttention&, const Item&, int, const Scratch&);              \
    void run_segment(const BestTokens&, int64_t, int64_t, BestPart&);                         \
    }

NLD_DECLARE_ISA(avx512bf16)
NLD_DECLARE_ISA(avx512)
NLD_DECLARE_ISA(avx2)
NLD_DECLARE_ISA(portable)
