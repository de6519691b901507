#include "launch_mma.cuh"

template int nld::launch_mma<nld::Float16>(const AttentionParams&, const LaunchPlan&, cudaStream_t);
