#define NLD_ISA avx512bf16
#define NLD_LANES 16
#include "isa_entries.h"
