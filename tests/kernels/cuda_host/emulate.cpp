// Controls of the emulation for tests.
#include "simt.h"

extern "C" void nld_emulate(int seed, int processors, int shared_limit) {
    nld::simt::random.seed(static_cast<unsigned>(seed));
    nld::simt::processors = processors;
    nld::simt::shared_limit = shared_limit;
}
