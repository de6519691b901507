// Positions of a tile's elements in shared memory.
#pragma once

#include "scalars.h"

namespace nld {

// Rows of kHead elements in chunks of 16 bytes, placed so that the same chunk of 8 consecutive rows (what ldmatrix
// reads at once) falls into 8 different groups of banks: by an XOR if a row is a multiple of 128 bytes, else by
// padding.
template <typename T, int kHead>
struct TileLayout {
    static constexpr int kChunk = 16 / static_cast<int>(sizeof(T));  // elements
    static constexpr int kChunks = kHead / kChunk;
    static constexpr bool kSwizzled = sizeof(T) == 2 && kChunks % 8 == 0;
    static constexpr int kRowBytes = 16 * (kSwizzled ? kChunks : kChunks + 1);

    NLD_HOST_DEVICE static int offset(int row, int chunk) {
        return row * kRowBytes + 16 * (kSwizzled ? chunk ^ (row & 7) : chunk);
    }
};

// Sizes of the tensor-core kernel, for a padded head size.
template <int kHead, int kWarps>
struct MmaShape {
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kM = 16 * kWarps;             // folded queries
    static constexpr int kN = kHead <= 128 ? 64 : 32;  // keys
    static constexpr int kStages = kHead <= 64 ? 3 : 2;
    static constexpr bool kQueryInRegisters = kHead <= 128;
    static constexpr int kRowBytes = TileLayout<uint16_t, kHead>::kRowBytes;
    static constexpr int kQueryBytes = kM * kRowBytes;
    static constexpr int kTileBytes = kN * kRowBytes;  // keys or values of one stage
    static constexpr int kSharedBytes = kQueryBytes + 2 * kStages * kTileBytes;
};

// Sizes of the float32 kernel.
template <int kHead>
struct FmaShape {
    static constexpr int kWarps = 4;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kQueriesPerWarp = 8;
    static constexpr int kM = kWarps * kQueriesPerWarp;
    static constexpr int kN = 32;  // a key per lane
    static constexpr int kRowBytes = TileLayout<float, kHead>::kRowBytes;
    static constexpr int kWeightBytes = kM * kN * 4;
    static constexpr int kSharedBytes = (kM + 2 * kN) * kRowBytes + kWeightBytes;
};

}  // namespace nld
