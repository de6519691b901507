// Attention of float32 without tensor cores: exact products, sums in float32. Each warp owns 8 folded queries; its
// lanes are keys for the scores and columns for the output.
#pragma once

#include "attention_work.cuh"
#include "load_tile.cuh"

namespace nld {

struct alignas(16) Float4 {
    float at[4];
};

template <int kHead>
struct FmaKernel {
    using Shape = FmaShape<kHead>;
    using Layout = TileLayout<float, kHead>;
    static constexpr int kQueries = Shape::kQueriesPerWarp;
    static constexpr int kColumns = kHead / 32;  // output columns per lane

    struct Shared {
        char* queries;
        char* keys;
        char* values;
        char* weights;  // [kM][kN]

        NLD_DEVICE explicit Shared(char* base)
            : queries(base),
              keys(queries + Shape::kM * Shape::kRowBytes),
              values(keys + Shape::kN * Shape::kRowBytes),
              weights(values + Shape::kN * Shape::kRowBytes) {}
    };

    NLD_DEVICE static const Float4& chunk(const char* tile, int row, int index) {
        return *reinterpret_cast<const Float4*>(tile + Layout::offset(row, index));
    }

    NLD_DEVICE static int first_row() { return thread_index() / 32 * kQueries; }

    NLD_DEVICE static void load_queries(const AttentionParams& params, const Work& work, char* to) {
        const QuerySource source = {params.query.base + work.start * params.query.token +
                                        static_cast<int64_t>(work.kv_head) * params.group * params.query.head,
                                    params.query.token,
                                    params.query.head,
                                    4,
                                    params.group,
                                    work.first_query,
                                    work.queries,
                                    params.query.path};
        load_tile<float, kHead, Shape::kM, Shape::kThreads>(to, source, params.head_size);
    }

    NLD_DEVICE static void load_keys_and_values(const AttentionParams& params, const Work& work, const Tile& tile,
                                                const Shared& shared) {
#pragma unroll 1
        for (int part = 0; part < 2; ++part) {
            const TokenSource source =
                tile.fresh ? fresh_source(part == 0 ? params.key : params.value, 4, work.start, work.kv_head, tile)
                           : prefix_source(part == 0 ? params.key_pages : params.value_pages, params, work.row,
                                           work.kv_head, tile);
            load_tile<float, kHead, Shape::kN, Shape::kThreads>(part == 0 ? shared.keys : shared.values, source,
                                                                params.head_size);
        }
    }

    NLD_DEVICE static void multiply_keys(const Shared& shared, float (&scores)[kQueries]) {
        const int lane = thread_index() % 32;
#pragma unroll 2
        for (int index = 0; index < Layout::kChunks; ++index) {
            const Float4 key = chunk(shared.keys, lane, index);
#pragma unroll
            for (int query = 0; query < kQueries; ++query) {
                const Float4 other = chunk(shared.queries, first_row() + query, index);
#pragma unroll
                for (int i = 0; i < 4; ++i) scores[query] += key.at[i] * other.at[i];
            }
        }
    }

    NLD_DEVICE static void mask_scores(const AttentionParams& params, const Work& work, const Tile& tile,
                                       float (&scores)[kQueries]) {
        const int kind = tile.fresh ? work.mask_kind : static_cast<int>(kMaskAll);
        const int key = tile.first + thread_index() % 32;
#pragma unroll
        for (int i = 0; i < kQueries; ++i) {
            const int query = work.first_query + first_row() + i;
            const int token = least(query, work.queries - 1) / params.group;
            if (key >= tile.end || !sees(kind, token, key)) scores[i] = minus_infinity();
        }
    }

    // Weights go to shared memory, because other lanes need them.
    NLD_DEVICE static void update_softmax(float (&scores)[kQueries], float (&maxima)[kQueries],
                                          float (&totals)[kQueries], float (&sums)[kQueries][kColumns], float factor,
                                          char* weights) {
        const int lane = thread_index() % 32;
#pragma unroll
        for (int i = 0; i < kQueries; ++i) {
            float maximum = fmaxf(maxima[i], scores[i]);
#pragma unroll
            for (int distance = 16; distance > 0; distance /= 2)
                maximum = fmaxf(maximum, shuffle_xor(maximum, distance));
            const float base = softmax_base(maximum);
            const float shrink = exp2_fast(maxima[i] - base), weight = exp2_fast(scores[i] - base);
            maxima[i] = maximum;
            totals[i] = totals[i] * shrink + weight;  // of this lane's keys only
#pragma unroll
            for (int column = 0; column < kColumns; ++column) sums[i][column] *= shrink * factor;
            reinterpret_cast<float*>(weights)[(first_row() + i) * Shape::kN + lane] = weight;
        }
        sync_warp();
    }

    NLD_DEVICE static void multiply_values(const Shared& shared, float (&sums)[kQueries][kColumns]) {
        const int lane = thread_index() % 32;
#pragma unroll 1
        for (int first = 0; first < Shape::kN; first += 4) {
            float value[4][kColumns];
#pragma unroll
            for (int key = 0; key < 4; ++key) {
#pragma unroll
                for (int i = 0; i < kColumns; ++i)
                    value[key][i] = chunk(shared.values, first + key, lane / 4 + 8 * i).at[lane % 4];
            }
#pragma unroll
            for (int query = 0; query < kQueries; ++query) {
                const Float4 weight =
                    *reinterpret_cast<const Float4*>(shared.weights + 4 * ((first_row() + query) * Shape::kN + first));
#pragma unroll
                for (int key = 0; key < 4; ++key) {
#pragma unroll
                    for (int i = 0; i < kColumns; ++i) sums[query][i] += weight.at[key] * value[key][i];
                }
            }
        }
    }

    NLD_DEVICE static void write_one(const AttentionParams& params, const Destination& to, float maximum, float total,
                                     float factor, const float (&sums)[kColumns]) {
        const int lane = thread_index() % 32;
        float* out = reinterpret_cast<float*>(params.output) + to.output;
        if (params.partials != nullptr) {
            out = params.partials + params.workspace.sums(to.entry);
            float* statistics = params.partials + params.workspace.statistics(to.entry);
            if (lane == 0) statistics[0] = maximum;
            if (lane == 0) statistics[1] = total;
            if (total == 0.0f) return;  // merging does not read the sums then
        } else {
            factor *= inverse_sum(total);
        }
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            if (lane + 32 * i < params.head_size) out[lane + 32 * i] = sums[i] * factor;
        }
    }

    NLD_DEVICE static void write(const AttentionParams& params, const Work& work, const float (&maxima)[kQueries],
                                 float (&totals)[kQueries], const float (&sums)[kQueries][kColumns]) {
        const float factor = work.tiles.fresh_tiles == 0 ? work.v_scale : 1.0f;
#pragma unroll
        for (int i = 0; i < kQueries; ++i) {
#pragma unroll
            for (int distance = 16; distance > 0; distance /= 2) totals[i] += shuffle_xor(totals[i], distance);
            const int query = work.first_query + first_row() + i;
            if (query < work.queries)
                write_one(params, destination(params, work, query), maxima[i], totals[i], factor, sums[i]);
        }
    }

    NLD_DEVICE static void run(const AttentionParams& params, const Work& work, const Shared& shared) {
        float maxima[kQueries], totals[kQueries] = {}, sums[kQueries][kColumns] = {};
#pragma unroll
        for (int i = 0; i < kQueries; ++i) maxima[i] = minus_infinity();
        if (work.tiles.count() > 0) load_queries(params, work, shared.queries);
#pragma unroll 1
        for (int index = 0; index < work.tiles.count(); ++index) {
            const Tile tile = work.tiles.at(index, Shape::kN);
            sync_threads();  // no thread reads the previous tile any more
            load_keys_and_values(params, work, tile, shared);
            copy_async_commit();
            copy_async_wait<0>();
            sync_threads();
            float scores[kQueries] = {};
            multiply_keys(shared, scores);
            const float scale = tile.fresh ? params.fresh_scale : work.prefix_scale;
#pragma unroll
            for (int i = 0; i < kQueries; ++i) scores[i] *= scale;
            if (needs_mask<Shape::kN>(work, tile)) mask_scores(params, work, tile, scores);
            // At the first fresh tile, the sums contain only cached values, which v_scale multiplies.
            const float factor = index == work.tiles.prefix_tiles ? work.v_scale : 1.0f;
            update_softmax(scores, maxima, totals, sums, factor, shared.weights);
            multiply_values(shared, sums);
        }
        write(params, work, maxima, totals, sums);
    }
};

template <int kHead>
NLD_KERNEL(FmaShape<kHead>::kThreads)
attention_fma(const NLD_GRID_CONSTANT AttentionParams params) {
    using Kernel = FmaKernel<kHead>;
    const Work work = find_work<Kernel::Shape::kM, Kernel::Shape::kN>(params);
    if (work.any()) Kernel::run(params, work, typename Kernel::Shared(shared_memory()));
}

}  // namespace nld
