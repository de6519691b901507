#define NLD_ISA portable
#define NLD_LANES 4
#include "isa_entries.h"
