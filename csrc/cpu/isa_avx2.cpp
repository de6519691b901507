#define NLD_ISA avx2
#define NLD_LANES 8
#include "isa_entries.h"
