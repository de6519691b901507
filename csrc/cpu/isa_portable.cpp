#define NLD_ISA portable
#define NLD_LANES 4
#include "instruction_sets.h"
#include "tile_kernel.h"

namespace nld::portable {

void run_piece(const BlockAttention& call, const Item& item, int head, int first, int last, const Scratch& scratch) {
    piece(call, item, head, first, last, scratch);
}

void run_finish(const BlockAttention& call, const Item& item, int head, const Scratch& scratch) {
    finish(call, item, head, scratch);
}

}  // namespace nld::portable
