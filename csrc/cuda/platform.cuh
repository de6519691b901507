// The parts of CUDA that kernels use, as functions: thread position, barriers, shuffles, and PTX instructions.
//
// With NLD_EMULATE defined, tests/kernels/cuda_host/simt.h provides the same functions on the CPU; so the kernels'
// logic is tested without a GPU. So kernels may use only what is declared here from CUDA.
#pragma once

#include <stdint.h>

#ifdef NLD_EMULATE
#include "simt.h"
#else

#include <cuda_runtime.h>

#include "scalars.h"

#define NLD_DEVICE __device__ __forceinline__
// One block per processor is enough. Without this, ptxas aims for several and spills registers.
#define NLD_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define NLD_GRID_CONSTANT __grid_constant__

namespace nld {

NLD_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
NLD_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
NLD_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
NLD_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }
NLD_DEVICE void sync_threads() { __syncthreads(); }
NLD_DEVICE void sync_warp() { __syncwarp(); }
NLD_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
NLD_DEVICE int shuffle_xor(int value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
NLD_DEVICE int shuffle_up(int value, int distance) {
    return __shfl_up_sync(0xffffffffu, value, static_cast<unsigned>(distance));
}

NLD_DEVICE char* shared_memory() {
    extern __shared__ __align__(128) char nld_shared_memory[];
    return nld_shared_memory;
}

// 2^x; -inf gives 0.
NLD_DEVICE float exp2_fast(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

NLD_DEVICE float natural_log(float x) { return logf(x); }

NLD_DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts copying 16 bytes to shared memory; zeros instead where not `valid` (nothing is read then).
NLD_DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
}
NLD_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's latest groups are in flight.
template <int kPending>
NLD_DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
NLD_DEVICE void load_matrices(uint32_t (&out)[4], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(shared))
                 : "memory");
}
NLD_DEVICE void load_matrices_transposed(uint32_t (&out)[4], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(shared))
                 : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8], by one warp.
template <typename T>
NLD_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
NLD_DEVICE void multiply_add<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
NLD_DEVICE void multiply_add<Float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

constexpr int kEmulated = 0;

inline const char* device_message(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

struct DeviceLimits {
    int processors = 0;    // streaming multiprocessors
    int shared_bytes = 0;  // most dynamic shared memory of a block
};

// Of the current device. Both queries are allowed while a stream is captured. Returns a cudaError_t.
inline int device_limits(DeviceLimits* limits) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&limits->processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&limits->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return static_cast<int>(error);
}

// Enqueues a kernel of one parameter. Returns a cudaError_t.
template <typename Params>
int launch(void (*kernel)(Params), int x, int y, int z, int threads, int shared_bytes, cudaStream_t stream,
           const Params& params) {
    if (shared_bytes > 48 * 1024) {
        const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                       cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
        if (error != cudaSuccess) return static_cast<int>(error);
    }
    const dim3 grid(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
    kernel<<<grid, static_cast<unsigned>(threads), static_cast<size_t>(shared_bytes), stream>>>(params);
    return static_cast<int>(cudaGetLastError());
}

}  // namespace nld

#endif  // NLD_EMULATE
