// A CUDA thread block on the CPU: implements csrc/cuda/platform.cuh, so that the kernels themselves run in tests.
//
// Every thread is a fiber. It runs until it has to wait: at a barrier for the block, at a warp instruction (shuffle,
// ldmatrix, mma) for its warp. Blocks run one after another. To reveal mistakes:
// - threads run in a new random order at every turn;
// - asynchronous copies happen at the latest moment that CUDA allows (the wait), or at the earliest (the copy), at
  // random;
// - shared memory starts as NaN;
// - addresses outside shared memory or not aligned, lanes of a warp at different instructions, threads that wait
  // forever and copies that no thread waits for make the launch fail.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "nld_cuda.h"
#include "scalars.h"

#define NLD_DEVICE inline
#define NLD_KERNEL(threads) inline void
#define NLD_GRID_CONSTANT

namespace nld {

constexpr int kEmulated = 1;

namespace simt {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kFailed = 9999;

struct Copy {
    char* to;
    const char* from;
    bool valid;

    void run() const {
        if (valid)
            memcpy(to, from, 16);
        else
            memset(to, 0, 16);
    }
};

enum class Operation { kNone, kShuffleXor, kShuffleUp, kMatrices, kMatricesTransposed, kMultiply, kSyncWarp };

struct Thread {
    ucontext_t beginning;
    jmp_buf place;  // where it goes on; swapcontext would ask the operating system for every switch
    bool started = false;
    bool done = false;
    bool waiting = false;
    std::vector<Copy> open_group;
    std::deque<std::vector<Copy>> groups;
    // A warp instruction's operands and results.
    uint32_t in[8];
    int argument = 0;
    const char* address = nullptr;
    uint32_t out[4];
};

struct Warp {
    Operation operation = Operation::kNone;
    int arrived = 0;
};

struct Block {
    int index[3];
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::unique_ptr<char[]> storage;
    char* shared = nullptr;
    size_t shared_bytes = 0;
    int at_barrier = 0;
    bool lazy = true;
    jmp_buf scheduler;
    void (*body)(const void* kernel, const void* params) = nullptr;
    const void* kernel = nullptr;
    const void* params = nullptr;
};

inline std::vector<char> stacks;  // of all threads; kept for the next launch
inline Block* block = nullptr;
inline int current = 0;
inline std::mt19937 random(1);
inline int processors = 8;
inline int shared_limit = 227 * 1024;

inline const char* failure = nullptr;

// Aborts the launch.
[[noreturn]] inline void fail(const char* what) {
    failure = what;
    _longjmp(block->scheduler, 1);
}

inline Thread& thread() { return block->threads[static_cast<size_t>(current)]; }

inline void wait() {
    thread().waiting = true;
    if (_setjmp(thread().place) == 0) _longjmp(block->scheduler, 1);
}

// Runs the current thread until it waits, ends or fails.
inline void go_on() {
    if (_setjmp(block->scheduler) != 0) return;
    if (thread().started) _longjmp(thread().place, 1);
    thread().started = true;
    setcontext(&thread().beginning);
}

inline void check_shared(const void* address, size_t bytes) {
    const char* place = static_cast<const char*>(address);
    if (place < block->shared || place + bytes > block->shared + block->shared_bytes) fail("outside shared memory");
    if (reinterpret_cast<uintptr_t>(place) % bytes != 0) fail("shared address not aligned");
}

// A lane's place in an 8 x 8 matrix.
inline uint32_t element(const Thread* lanes, int matrix, int row, int column) {
    uint16_t bits;
    memcpy(&bits, lanes[8 * matrix + row].address + 2 * column, 2);
    return bits;
}

inline void load_matrices(Thread* lanes, bool transposed) {
    for (int lane = 0; lane < 32; ++lane) check_shared(lanes[lane].address, 16);
    for (int lane = 0; lane < 32; ++lane) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            const int outer = lane / 4, inner = 2 * (lane % 4);
            const uint32_t low =
                transposed ? element(lanes, matrix, inner, outer) : element(lanes, matrix, outer, inner);
            const uint32_t high =
                transposed ? element(lanes, matrix, inner + 1, outer) : element(lanes, matrix, outer, inner + 1);
            lanes[lane].out[matrix] = low | high << 16;
        }
    }
}

inline float half_of(uint32_t word, int which, bool bfloat16) {
    const uint16_t bits = static_cast<uint16_t>(word >> (16 * which));
    return bfloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
}

// The fragment layouts of mma.m16n8k16 as PTX defines them. in: a[4], b[2]; out: the terms added to c.
inline void multiply(Thread* lanes) {
    const bool bfloat16 = lanes[0].argument != 0;
    static float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const int group = lane / 4, place = 2 * (lane % 4);
        for (int i = 0; i < 2; ++i) {
            a[group][place + i] = half_of(lanes[lane].in[0], i, bfloat16);
            a[group + 8][place + i] = half_of(lanes[lane].in[1], i, bfloat16);
            a[group][place + 8 + i] = half_of(lanes[lane].in[2], i, bfloat16);
            a[group + 8][place + 8 + i] = half_of(lanes[lane].in[3], i, bfloat16);
            b[place + i][group] = half_of(lanes[lane].in[4], i, bfloat16);
            b[place + 8 + i][group] = half_of(lanes[lane].in[5], i, bfloat16);
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            float sum = 0.0f;
            for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
            lanes[lane].out[i] = bits_from_float(sum);
        }
    }
}

inline void execute(Operation operation, Thread* lanes) {
    switch (operation) {
        case Operation::kShuffleXor:
            for (int lane = 0; lane < 32; ++lane) lanes[lane].out[0] = lanes[lane ^ lanes[lane].argument].in[0];
            break;
        case Operation::kShuffleUp:
            for (int lane = 0; lane < 32; ++lane) {
                const int from = lane - lanes[lane].argument;
                lanes[lane].out[0] = lanes[from < 0 ? lane : from].in[0];
            }
            break;
        case Operation::kMatrices:
            load_matrices(lanes, false);
            break;
        case Operation::kMatricesTransposed:
            load_matrices(lanes, true);
            break;
        case Operation::kMultiply:
            multiply(lanes);
            break;
        default:
            break;
    }
}

// The last lane to arrive executes the instruction for the whole warp.
inline void warp_instruction(Operation operation) {
    const size_t warp_index = static_cast<size_t>(current) / 32;
    Warp& warp = block->warps[warp_index];
    if (warp.arrived == 0) warp.operation = operation;
    if (warp.operation != operation) fail("lanes of a warp at different instructions");
    if (++warp.arrived < 32) return wait();
    Thread* lanes = &block->threads[32 * warp_index];
    execute(operation, lanes);
    warp.arrived = 0;
    for (int lane = 0; lane < 32; ++lane) lanes[lane].waiting = false;
}

inline void entry() {
    block->body(block->kernel, block->params);
    if (!thread().open_group.empty()) fail("asynchronous copies never committed");
    for (const auto& group : thread().groups)
        if (!group.empty()) fail("a thread ended before its asynchronous copies");
    thread().done = true;
    _longjmp(block->scheduler, 1);
}

inline void start(Thread& thread, char* stack) {
    getcontext(&thread.beginning);
    thread.beginning.uc_stack.ss_sp = stack;
    thread.beginning.uc_stack.ss_size = kStackBytes;
    thread.beginning.uc_link = nullptr;
    makecontext(&thread.beginning, entry, 0);
}

// Runs one block to its end.
inline void run(Block& now) {
    block = &now;
    now.lazy = random() % 4 != 0;
    memset(now.shared, 0xff, now.shared_bytes);
    for (Warp& warp : now.warps) warp = Warp();
    now.at_barrier = 0;
    for (size_t i = 0; i < now.threads.size(); ++i) {
        Thread& thread = now.threads[i];
        thread.started = thread.done = thread.waiting = false;
        thread.open_group.clear();
        thread.groups.clear();
        start(thread, &stacks[i * kStackBytes]);
    }
    const int count = static_cast<int>(now.threads.size());
    int left = count;
    while (left > 0) {
        const int first = static_cast<int>(random() % static_cast<unsigned>(count));
        const int step = random() % 2 ? 1 : count - 1;
        bool progress = false;
        for (int i = 0; i < count; ++i) {
            current = static_cast<int>((first + static_cast<int64_t>(i) * step) % count);
            if (thread().done || thread().waiting) continue;
            progress = true;
            go_on();
            if (failure != nullptr) return;
            if (thread().done) --left;
        }
        if (left > 0 && now.at_barrier == left) {  // threads that ended count as arrived, as on a GPU
            now.at_barrier = 0;
            for (Thread& thread : now.threads) thread.waiting = false;
            progress = true;
        }
        if (!progress) {
            failure = "threads wait forever";
            return;
        }
    }
    block = nullptr;
}

}  // namespace simt

inline int thread_index() { return simt::current; }
inline int block_x() { return simt::block->index[0]; }
inline int block_y() { return simt::block->index[1]; }
inline int block_z() { return simt::block->index[2]; }
inline char* shared_memory() { return simt::block->shared; }
inline float exp2_fast(float x) { return exp2f(x); }
inline float natural_log(float x) { return logf(x); }

inline void sync_threads() {
    ++simt::block->at_barrier;
    simt::wait();
}

inline void sync_warp() { simt::warp_instruction(simt::Operation::kSyncWarp); }

inline float shuffle_xor(float value, int mask) {
    simt::thread().in[0] = bits_from_float(value);
    simt::thread().argument = mask;
    simt::warp_instruction(simt::Operation::kShuffleXor);
    return float_from_bits(simt::thread().out[0]);
}

inline int shuffle_xor(int value, int mask) {
    simt::thread().in[0] = static_cast<uint32_t>(value);
    simt::thread().argument = mask;
    simt::warp_instruction(simt::Operation::kShuffleXor);
    return static_cast<int>(simt::thread().out[0]);
}

inline int shuffle_up(int value, int distance) {
    simt::thread().in[0] = static_cast<uint32_t>(value);
    simt::thread().argument = distance;
    simt::warp_instruction(simt::Operation::kShuffleUp);
    return static_cast<int>(simt::thread().out[0]);
}

inline void copy_async_16(void* shared, const void* global, bool valid) {
    simt::check_shared(shared, 16);
    if (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0) simt::fail("global address not aligned");
    simt::thread().open_group.push_back({static_cast<char*>(shared), static_cast<const char*>(global), valid});
    if (!simt::block->lazy) simt::thread().open_group.back().run();
}

inline void copy_async_commit() {
    simt::thread().groups.push_back(std::move(simt::thread().open_group));
    simt::thread().open_group.clear();
}

template <int kPending>
inline void copy_async_wait() {
    auto& groups = simt::thread().groups;
    while (groups.size() > static_cast<size_t>(kPending)) {
        if (simt::block->lazy)
            for (const simt::Copy& copy : groups.front()) copy.run();
        groups.pop_front();
    }
}

inline void load_matrices(uint32_t (&out)[4], const void* shared) {
    simt::thread().address = static_cast<const char*>(shared);
    simt::warp_instruction(simt::Operation::kMatrices);
    memcpy(out, simt::thread().out, sizeof out);
}

inline void load_matrices_transposed(uint32_t (&out)[4], const void* shared) {
    simt::thread().address = static_cast<const char*>(shared);
    simt::warp_instruction(simt::Operation::kMatricesTransposed);
    memcpy(out, simt::thread().out, sizeof out);
}

template <typename T>
struct IsBFloat16 {
    static constexpr bool value = false;
};
template <>
struct IsBFloat16<BFloat16> {
    static constexpr bool value = true;
};

template <typename T>
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    simt::Thread& thread = simt::thread();
    memcpy(thread.in, a, sizeof a);
    thread.in[4] = b0;
    thread.in[5] = b1;
    thread.argument = IsBFloat16<T>::value;
    simt::warp_instruction(simt::Operation::kMultiply);
    for (int i = 0; i < 4; ++i) c[i] += float_from_bits(thread.out[i]);
}

inline const char* device_message(int status) {
    return status == simt::kFailed && simt::failure != nullptr ? simt::failure : "no such error";
}

struct DeviceLimits {
    int processors = 0;
    int shared_bytes = 0;
};

inline int device_limits(DeviceLimits* limits) {
    *limits = {simt::processors, simt::shared_limit};
    return 0;
}

template <typename Params>
int launch(void (*kernel)(Params), int x, int y, int z, int threads, int shared_bytes, cudaStream_t,
           const Params& params) {
    simt::failure = nullptr;
    simt::Block block;
    block.threads.resize(static_cast<size_t>(threads));
    block.warps.resize(static_cast<size_t>(threads) / 32);
    simt::stacks.resize(std::max(simt::stacks.size(), static_cast<size_t>(threads) * simt::kStackBytes));
    block.shared_bytes = static_cast<size_t>(shared_bytes);
    block.storage.reset(new char[block.shared_bytes + 128]);
    block.shared = block.storage.get() + (128 - reinterpret_cast<uintptr_t>(block.storage.get()) % 128);
    block.kernel = reinterpret_cast<const void*>(kernel);
    block.params = &params;
    block.body = [](const void* kernel, const void* params) {
        reinterpret_cast<void (*)(Params)>(const_cast<void*>(kernel))(*static_cast<const Params*>(params));
    };
    for (int k = 0; k < z; ++k) {
        for (int j = 0; j < y; ++j) {
            for (int i = 0; i < x; ++i) {
                block.index[0] = i;
                block.index[1] = j;
                block.index[2] = k;
                simt::run(block);
                if (simt::failure != nullptr) return simt::kFailed;
            }
        }
    }
    return 0;
}

}  // namespace nld
