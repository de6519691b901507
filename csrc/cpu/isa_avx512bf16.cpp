#define NLD_ISA avx512bf16
#define NLD_LANES 16
#define NLD_BFLOAT16_PAIRS
#include "isa_entries.h"
