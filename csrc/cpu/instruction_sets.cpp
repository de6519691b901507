#include "instruction_sets.h"

namespace nld {

namespace {

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Intel's cores take two cycles where AMD's take half a cycle: an Emerald Rapids reached 165 GFLOP/s with bf16 pairs,
// but 338 with float32. AMX is fast there, but these kernels do not use it.
bool has_fast_avx512bf16() { return has_avx512bf16() && !__builtin_cpu_is("intel"); }
#endif

}  // namespace

const std::vector<Isa>& instruction_sets() {
    static const std::vector<Isa> all = {
#if defined(__x86_64__)
        {"avx512bf16", has_avx512bf16, has_fast_avx512bf16, true, avx512bf16::run_attend_tiles,
         avx512bf16::run_write_out, avx512bf16::run_segment},
        {"avx512", has_avx512, has_avx512, false, avx512::run_attend_tiles, avx512::run_write_out, avx512::run_segment},
        {"avx2", has_avx2, has_avx2, false, avx2::run_attend_tiles, avx2::run_write_out, avx2::run_segment},
#endif
        {"portable", always, always, false, portable::run_attend_tiles, portable::run_write_out, portable::run_segment},
    };
    return all;
}

}  // namespace nld
