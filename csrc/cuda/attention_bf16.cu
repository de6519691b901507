#include "launch_mma.cuh"

template int nld::launch_mma<nld::BFloat16>(const AttentionParams&, const LaunchPlan&, cudaStream_t);
