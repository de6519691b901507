// What each isa_*.cpp, compiled with its own flags, offers.
#pragma once

#include "block_attention.h"

#define NLD_DECLARE_ISA(name)                                                          \
    namespace nld::name {                                                              \
    void run_piece(const BlockAttention&, const Item&, int, int, int, const Scratch&); \
    void run_finish(const BlockAttention&, const Item&, int, const Scratch&);          \
    void run_segment(const BestTokens&, int64_t, int64_t, BestPart&);                  \
    }

NLD_DECLARE_ISA(avx512bf16)
NLD_DECLARE_ISA(avx512)
NLD_DECLARE_ISA(avx2)
NLD_DECLARE_ISA(portable)
