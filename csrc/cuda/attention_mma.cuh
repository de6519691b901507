// Attention of 16-bit types on tensor cores (mma.sync m16n8k16). One CTA: kM folded queries of one row and KV head, and
// one split of the row's keys. Each warp owns 16 queries; keys and values of kN tokens per tile go through kStages
// stages of shared memory.
//
// Fragments: of a 16 x 8 accumulator, lane l holds rows l / 4 and l / 4 + 8, columns 2 * (l % 4) and the next one:
// {[row][column], [row][column + 1], [row + 8][column], [row + 8][column + 1]}.
#pragma once

#include "attention_work.cuh"
#include "load_tile.cuh"

namespace nld {

template <typename T, int kHead, int kWarps>
struct MmaKernel {
    using Shape = MmaShape<kHead, kWarps>;
    using Layout = TileLayout<T, kHead>;
    static constexpr int kStages = Shape::kStages;
    static constexpr int kKeyTiles = Shape::kN / 8;  // 8 keys each
    static constexpr int kHeadTiles = kHead / 8;     // 8 columns of the output each
    static constexpr int kHeadSteps = kHead / 16;    // products along the head dimension
    static constexpr int kQuerySteps = Shape::kQueryInRegisters ? kHeadSteps : 1;

    // A lane's two queries.
    struct Softmax {
        float maximum[2];
        float sum[2];  // of this lane's columns only
    };

    NLD_DEVICE static char* keys(char* shared, int stage) {
        return shared + Shape::kQueryBytes + 2 * stage * Shape::kTileBytes;
    }
    NLD_DEVICE static char* values(char* shared, int stage) { return keys(shared, stage) + Shape::kTileBytes; }

    NLD_DEVICE static void load_queries(const AttentionParams& params, const Work& work, char* shared) {
        const QuerySource source = {params.query.base + work.start * params.query.token +
                                        static_cast<int64_t>(work.kv_head) * params.group * params.query.head,
                                    params.query.token,
                                    params.query.head,
                                    static_cast<int64_t>(sizeof(T)),
                                    params.group,
                                    work.first_query,
                                    work.queries,
                                    params.query.path};
        load_tile<T, kHead, Shape::kM, Shape::kThreads>(shared, source, params.head_size);
    }

    // Two groups: keys, values. After the last tile they are empty, so that the count of groups stays simple.
    NLD_DEVICE static void load_keys_and_values(const AttentionParams& params, const Work& work, char* shared,
                                                int index) {
        const bool any = index < work.tiles.count();
        const Tile tile = work.tiles.at(index, Shape::kN);
        const int stage = index % kStages;
#pragma unroll 1
        for (int part = 0; part < 2; ++part) {
            char* to = part == 0 ? keys(shared, stage) : values(shared, stage);
            if (any) {
                const TokenSource source =
                    tile.fresh ? fresh_source(part == 0 ? params.key : params.value, static_cast<int>(sizeof(T)),
                                              work.start, work.kv_head, tile)
                               : prefix_source(part == 0 ? params.key_pages : params.value_pages, params, work.row,
                                               work.kv_head, tile);
                load_tile<T, kHead, Shape::kN, Shape::kThreads>(to, source, params.head_size);
            }
            copy_async_commit();
        }
    }

    // The 16 x 16 operand of this warp's queries at one step along the head dimension.
    NLD_DEVICE static void read_queries(const char* shared, int step, uint32_t (&out)[4]) {
        const int lane = thread_index() % 32, warp = thread_index() / 32;
        const int row = warp * 16 + lane % 16, chunk = 2 * step + lane / 16;
        load_matrices(out, shared + Layout::offset(row, chunk));
    }

    // scores = queries keys^T.
    NLD_DEVICE static void multiply_keys(const char* shared, const char* tile,
                                         const uint32_t (&queries)[kQuerySteps][4], float (&scores)[kKeyTiles][4]) {
        const int lane = thread_index() % 32;
        const int row = lane % 8 + lane / 16 * 8, half = lane / 8 % 2;
#pragma unroll
        for (int step = 0; step < kHeadSteps; ++step) {
            uint32_t a[4];
            if constexpr (Shape::kQueryInRegisters) {
#pragma unroll
                for (int i = 0; i < 4; ++i) a[i] = queries[step][i];
            } else {
                read_queries(shared, step, a);
            }
#pragma unroll
            for (int pair = 0; pair < kKeyTiles / 2; ++pair) {
                uint32_t b[4];
                load_matrices(b, tile + Layout::offset(16 * pair + row, 2 * step + half));
                multiply_add<T>(scores[2 * pair], a, b[0], b[1]);
                multiply_add<T>(scores[2 * pair + 1], a, b[2], b[3]);
            }
        }
    }

    // sums += weights values. The packed accumulators of two adjacent key tiles are the operand of 16 keys.
    NLD_DEVICE static void multiply_values(const char* tile, const float (&weights)[kKeyTiles][4],
                                           float (&sums)[kHeadTiles][4]) {
        const int lane = thread_index() % 32;
        const int row = lane % 16, half = lane / 16;
#pragma unroll
        for (int step = 0; step < kKeyTiles / 2; ++step) {
            const float (&low)[4] = weights[2 * step], (&high)[4] = weights[2 * step + 1];
            const uint32_t a[4] = {pack<T>(low[0], low[1]), pack<T>(low[2], low[3]), pack<T>(high[0], high[1]),
                                   pack<T>(high[2], high[3])};
#pragma unroll
            for (int pair = 0; pair < kHeadTiles / 2; ++pair) {
                uint32_t b[4];
                load_matrices_transposed(b, tile + Layout::offset(16 * step + row, 2 * pair + half));
                multiply_add<T>(sums[2 * pair], a, b[0], b[1]);
                multiply_add<T>(sums[2 * pair + 1], a, b[2], b[3]);
            }
        }
    }

    NLD_DEVICE static int first_query(const Work& work) {
        return work.first_query + thread_index() / 32 * 16 + thread_index() % 32 / 4;
    }

    NLD_DEVICE static void mask_scores(const AttentionParams& params, const Work& work, const Tile& tile,
                                       float (&scores)[kKeyTiles][4]) {
        const int kind = tile.fresh ? work.mask_kind : static_cast<int>(kMaskAll);
        const int column = 2 * (thread_index() % 4);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int query = first_query(work) + 8 * half;
            const int token = least(query, work.queries - 1) / params.group;  // queries after the last are discarded
#pragma unroll
            for (int key_tile = 0; key_tile < kKeyTiles; ++key_tile) {
                const int first = tile.first + 8 * key_tile;
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int key = first + column + i;
                    if (key >= tile.end || !sees(kind, token, key)) scores[key_tile][2 * half + i] = minus_infinity();
                }
            }
        }
    }

    // Turns scaled scores into weights. `shrink` returns the factor for sums over earlier keys.
    NLD_DEVICE static void update_softmax(float (&scores)[kKeyTiles][4], Softmax& state, float (&shrink)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float maximum = state.maximum[half];
#pragma unroll
            for (int tile = 0; tile < kKeyTiles; ++tile)
                maximum = fmaxf(maximum, fmaxf(scores[tile][2 * half], scores[tile][2 * half + 1]));
            maximum = fmaxf(maximum, shuffle_xor(maximum, 1));
            maximum = fmaxf(maximum, shuffle_xor(maximum, 2));
            const float base = softmax_base(maximum);
            shrink[half] = exp2_fast(state.maximum[half] - base);
            state.maximum[half] = maximum;
            float sum = 0.0f;
#pragma unroll
            for (int tile = 0; tile < kKeyTiles; ++tile) {
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    scores[tile][i] = exp2_fast(scores[tile][i] - base);
                    sum += scores[tile][i];
                }
            }
            state.sum[half] = state.sum[half] * shrink[half] + sum;
        }
    }

    NLD_DEVICE static void scale_sums(float (&sums)[kHeadTiles][4], const float (&factor)[2]) {
#pragma unroll
        for (int tile = 0; tile < kHeadTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[tile][i] *= factor[i / 2];
        }
    }

    NLD_DEVICE static void write_output(const AttentionParams& params, const Destination& to, int half,
                                        const float (&sums)[kHeadTiles][4]) {
        T* output = reinterpret_cast<T*>(params.output) + to.output;
#pragma unroll
        for (int tile = 0; tile < kHeadTiles; ++tile) {
            const int column = 8 * tile + 2 * (thread_index() % 4);
            if (column >= params.head_size) continue;
            const float first = sums[tile][2 * half], second = sums[tile][2 * half + 1];
            if (params.output_pairs) {
                *reinterpret_cast<uint32_t*>(output + column) = pack<T>(first, second);
            } else {
                output[column] = from_float<T>(first);
                output[column + 1] = from_float<T>(second);
            }
        }
    }

    NLD_DEVICE static void write_partial(const AttentionParams& params, const Destination& to, int half,
                                         const float (&sums)[kHeadTiles][4], const Softmax& state) {
        if (thread_index() % 4 == 0) {
            float* statistics = params.partials + params.workspace.statistics(to.entry);
            statistics[0] = state.maximum[half];
            statistics[1] = state.sum[half];
        }
        if (state.sum[half] == 0.0f) return;  // merging does not read the sums then
        float* out = params.partials + params.workspace.sums(to.entry);
#pragma unroll
        for (int tile = 0; tile < kHeadTiles; ++tile) {
            const int column = 8 * tile + 2 * (thread_index() % 4);
            if (column >= params.head_size) continue;
            out[column] = sums[tile][2 * half];
            out[column + 1] = sums[tile][2 * half + 1];
        }
    }

    NLD_DEVICE static void write(const AttentionParams& params, const Work& work, float (&sums)[kHeadTiles][4],
                                 Softmax& state) {
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            state.sum[half] += shuffle_xor(state.sum[half], 1);
            state.sum[half] += shuffle_xor(state.sum[half], 2);
            factor[half] = params.partials != nullptr ? 1.0f : inverse_sum(state.sum[half]);
            if (work.tiles.fresh_tiles == 0) factor[half] *= work.v_scale;
        }
        scale_sums(sums, factor);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int query = first_query(work) + 8 * half;
            if (query >= work.queries) continue;
            const Destination to = destination(params, work, query);
            if (params.partials != nullptr)
                write_partial(params, to, half, sums, state);
            else
                write_output(params, to, half, sums);
        }
    }

    NLD_DEVICE static void run(const AttentionParams& params, const Work& work, char* shared) {
        uint32_t queries[kQuerySteps][4];
        float sums[kHeadTiles][4] = {};
        Softmax state = {{minus_infinity(), minus_infinity()}, {0.0f, 0.0f}};
        if (work.tiles.count() > 0) load_queries(params, work, shared);  // committed with the first keys
#pragma unroll 1
        for (int index = 0; index < kStages - 1; ++index) load_keys_and_values(params, work, shared, index);

#pragma unroll 1
        for (int index = 0; index < work.tiles.count(); ++index) {
            const Tile tile = work.tiles.at(index, Shape::kN);
            const int stage = index % kStages;
            copy_async_wait<2 * kStages - 3>();
            sync_threads();  // these keys have arrived, and the previous tile's stage is free
            if constexpr (Shape::kQueryInRegisters) {
                if (index == 0) {
#pragma unroll
                    for (int step = 0; step < kHeadSteps; ++step) read_queries(shared, step, queries[step]);
                }
            }
            load_keys_and_values(params, work, shared, index + kStages - 1);

            float scores[kKeyTiles][4] = {};
            multiply_keys(shared, keys(shared, stage), queries, scores);
            const float scale = tile.fresh ? params.fresh_scale : work.prefix_scale;
#pragma unroll
            for (int key_tile = 0; key_tile < kKeyTiles; ++key_tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) scores[key_tile][i] *= scale;
            }
            if (needs_mask<Shape::kN>(work, tile)) mask_scores(params, work, tile, scores);
            float shrink[2];
            update_softmax(scores, state, shrink);
            if (index == work.tiles.prefix_tiles) {  // sums so far contain cached values, later ones fresh values
                shrink[0] *= work.v_scale;
                shrink[1] *= work.v_scale;
            }
            scale_sums(sums, shrink);

            copy_async_wait<2 * kStages - 2>();
            sync_threads();  // these values have arrived
            multiply_values(values(shared, stage), scores, sums);
        }
        copy_async_wait<0>();
        write(params, work, sums, state);
    }
};

template <typename T, int kHead, int kWarps>
NLD_KERNEL(32 * kWarps)
attention_mma(const NLD_GRID_CONSTANT AttentionParams params) {
    using Kernel = MmaKernel<T, kHead, kWarps>;
    const Work work = find_work<Kernel::Shape::kM, Kernel::Shape::kN>(params);
    if (work.any()) Kernel::run(params, work, shared_memory());
}

}  // namespace nld
