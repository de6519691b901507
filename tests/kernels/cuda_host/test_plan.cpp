// The index arithmetic that kernels and launcher share, on the CPU.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <random>
#include <set>
#include <vector>

#include "platform.cuh"
// platform.cuh first, because it includes the emulation that kernel headers need
#include "accept_prefix.cuh"
#include "attention_merge.cuh"
#include "attention_plan.h"

#define CHECK(condition)                                           \
    do {                                                           \
        if (!(condition)) {                                        \
            printf("%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            exit(1);                                               \
        }                                                          \
    } while (0)

namespace nld {
namespace {

std::mt19937 generator(7);
int draw(int first, int last) { return std::uniform_int_distribution<int>(first, last)(generator); }
float draw_normal() { return std::normal_distribution<float>()(generator); }

void test_pages() {
    for (int page_size : {1, 2, 5, 16, 24, 128, 544}) {
        const int shift = page_shift(page_size);
        CHECK((shift >= 0) == ((page_size & (page_size - 1)) == 0));
        for (int token = 0; token < 3000; ++token) {
            const PageSlot place = page_slot(token, page_size, shift);
            CHECK(place.column * page_size + place.slot == token && place.slot >= 0 && place.slot < page_size);
        }
    }
}

void test_folding() {
    for (int group : {1, 3, 4, 8})
        for (int query = 0; query < 300; ++query) {
            const FoldedQuery folded = unfold(query, group);
            CHECK(folded.token * group + folded.member == query && folded.member < group);
        }
}

// Every token of the prefix and of the fresh block is in exactly one tile of one split.
void test_tiles_cover_everything_once() {
    for (int round = 0; round < 3000; ++round) {
        const int size = draw(0, 1) ? 64 : 32, splits = draw(1, 70);
        const int prefix = draw(0, 3) == 0 ? 0 : draw(0, 5000), fresh = draw(0, 200);
        std::vector<int> seen(static_cast<size_t>(prefix + fresh), 0);
        for (int split = 0; split < splits; ++split) {
            const TileList tiles = tile_list(prefix, fresh, size, split, splits);
            for (int i = 0; i < tiles.count(); ++i) {
                const Tile tile = tiles.at(i, size);
                CHECK(tile.first % size == 0 && tile.end == (tile.fresh ? fresh : prefix));
                CHECK(tile.fresh == (i >= tiles.prefix_tiles) && tile.first < tile.end);
                for (int token = tile.first; token < least(tile.first + size, tile.end); ++token)
                    ++seen[static_cast<size_t>(tile.fresh ? prefix + token : token)];
            }
        }
        for (int count : seen) CHECK(count == 1);
    }
}

void test_masks() {
    for (int round = 0; round < 200; ++round) {
        const int length = draw(1, 150), kind = draw(0, 1);
        for (int query = 0; query < length; ++query)
            for (int key = 0; key < length; ++key) {
                const bool expected = kind == 0 || key <= query;
                CHECK(sees(kind, query, key) == expected);
                if (expected) CHECK(key < fresh_end(kind, length, query));
            }
    }
    CHECK(fresh_end(kMaskCausal, 10, 3) == 4 && fresh_end(kMaskAll, 10, 3) == 10 &&
          fresh_end(kMaskCausal, 10, 40) == 10);
}

void test_workspace_has_no_overlap() {
    for (int round = 0; round < 100; ++round) {
        const int rows = draw(1, 3), kv_heads = draw(1, 3), splits = draw(2, 5), queries = draw(1, 9),
                  size = draw(2, 5) * 16;
        const Workspace space = workspace(rows, kv_heads, splits, queries, size);
        std::vector<int> used(static_cast<size_t>(space.floats()), 0);
        for (int row = 0; row < rows; ++row)
            for (int head = 0; head < kv_heads; ++head)
                for (int split = 0; split < splits; ++split)
                    for (int query = 0; query < queries; ++query) {
                        const int64_t entry = space.entry(row, head, split, query);
                        for (int i = 0; i < size; ++i) ++used.at(static_cast<size_t>(space.sums(entry) + i));
                        for (int i = 0; i < 2; ++i) ++used.at(static_cast<size_t>(space.statistics(entry) + i));
                    }
        for (int count : used) CHECK(count == 1);
    }
    CHECK(workspace(3, 2, 1, 10, 64).floats() == 0);
}

// Compares sums over parts of a softmax, merged as in attention_merge, with the softmax over everything.
void test_merging() {
    for (int round = 0; round < 500; ++round) {
        const int splits = draw(2, 9), size = 32;
        const Workspace space = workspace(1, 1, splits, 1, size);
        std::vector<float> partials(static_cast<size_t>(space.floats()), NAN);
        std::vector<double> expected(static_cast<size_t>(size), 0.0);
        double total = 0.0;
        for (int split = 0; split < splits; ++split) {
            const int keys = draw(0, 2) == 0 ? 0 : draw(1, 20);
            float maximum = minus_infinity(), sum = 0.0f;
            std::vector<float> sums(static_cast<size_t>(size), 0.0f);
            for (int key = 0; key < keys; ++key) {
                const float score = 20.0f * draw_normal(), value = draw_normal();
                const float bigger = fmaxf(maximum, score), shrink = exp2f(maximum - softmax_base(bigger));
                const float weight = exp2f(score - softmax_base(bigger));
                maximum = bigger;
                sum = sum * shrink + weight;
                for (int i = 0; i < size; ++i) {
                    const size_t at = static_cast<size_t>(i);
                    sums[at] = sums[at] * shrink + weight * value * static_cast<float>(i);
                    expected[at] += exp2(static_cast<double>(score)) * value * i;
                }
                total += exp2(static_cast<double>(score));
            }
            const int64_t entry = space.entry(0, 0, split, 0);
            partials[static_cast<size_t>(space.statistics(entry))] = maximum;
            partials[static_cast<size_t>(space.statistics(entry)) + 1] = sum;
            if (keys == 0) continue;  // the sums stay NaN and must not be read
            for (int i = 0; i < size; ++i)
                partials[static_cast<size_t>(space.sums(entry) + i)] = sums[static_cast<size_t>(i)];
        }
        std::vector<float> found(static_cast<size_t>(size), NAN);
        const int32_t starts[2] = {0, 1};
        AttentionParams params = {};
        params.output = reinterpret_cast<char*>(found.data());
        params.output_token = params.output_head = size;
        params.block_starts = starts;
        params.group = 1;
        params.workspace = space;
        params.partials = partials.data();
        CHECK(launch(attention_merge<float>, 1, 1, 1, 32 * kMergeWarps, 0, nullptr, params) == 0);
        for (int i = 0; i < size; ++i) {
            const double wanted = total == 0.0 ? 0.0 : expected[static_cast<size_t>(i)] / total;
            CHECK(fabs(found[static_cast<size_t>(i)] - wanted) <= 1e-4);
        }
    }
}

template <typename T, int kHead>
void test_layout() {
    using Layout = TileLayout<T, kHead>;
    std::set<int> offsets;
    for (int row = 0; row < 64; ++row)
        for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
            const int offset = Layout::offset(row, chunk);
            CHECK(offset % 16 == 0 && offset >= row * Layout::kRowBytes &&
                  offset + 16 <= (row + 1) * Layout::kRowBytes);
            CHECK(offsets.insert(offset).second);
        }
    for (int row = 0; row < 64; row += 8)
        for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
            std::set<int> banks;  // groups of 4 banks
            for (int i = 0; i < 8; ++i) banks.insert(Layout::offset(row + i, chunk) / 16 % 8);
            CHECK(banks.size() == 8);
        }
}

template <typename T>
void test_layouts() {
    test_layout<T, 32>();
    test_layout<T, 64>();
    test_layout<T, 96>();
    test_layout<T, 128>();
    test_layout<T, 192>();
    test_layout<T, 256>();
}

template <typename T>
void test_rounding(int mantissa_bits, int least_exponent) {
    for (uint32_t bits = 0; bits < 65536; ++bits) {  // every finite number, and the middle between two, is restored
        const T number = {static_cast<uint16_t>(bits)};
        const float value = to_float(number);
        if (value != value || isinf(value)) continue;
        CHECK(from_float<T>(value).bits == bits);
        int exponent = 0;
        if (value != 0.0f) frexpf(value, &exponent);
        const float ulp =
            ldexpf(1.0f, (value == 0.0f ? least_exponent : most(exponent - 1, least_exponent)) - mantissa_bits);
        const uint16_t up = from_float<T>(value + copysignf(ulp / 2, value)).bits;
        CHECK(up == static_cast<uint16_t>(bits + (bits & 1)));  // ties to even
        CHECK(from_float<T>(value + copysignf(ulp * 0.499f, value)).bits == bits);
    }
    CHECK(to_float(from_float<T>(NAN)) != to_float(from_float<T>(NAN)));
    CHECK(to_float(from_float<T>(-INFINITY)) == -INFINITY && to_float(from_float<T>(1e38f)) > 60000.0f);
}

void test_float8() {
    for (int bits = 0; bits < 256; ++bits) {
        const int sign = bits & 128 ? -1 : 1;
        const int exponent = (bits >> 3) & 15, mantissa = bits & 7;
        const double e4m3 = exponent ? ldexp(8 + mantissa, exponent - 10) : ldexp(mantissa, -9);
        const float found = float_from_e4m3(static_cast<uint8_t>(bits));
        CHECK((bits & 127) == 127 ? found != found : found == static_cast<float>(sign * e4m3));
        const int exponent5 = (bits >> 2) & 31, mantissa5 = bits & 3;
        const double e5m2 = exponent5 ? ldexp(4 + mantissa5, exponent5 - 17) : ldexp(mantissa5, -16);
        const float other = float_from_e5m2(static_cast<uint8_t>(bits));
        if (exponent5 == 31)
            CHECK(mantissa5 ? other != other : other == sign * INFINITY);
        else
            CHECK(other == static_cast<float>(sign * e5m2));
    }
}

void test_launch_plans() {
    NldBlockAttention call = {};
    call.type = call.cache_type = NLD_BFLOAT16;
    call.page_size = 16;
    for (int round = 0; round < 5000; ++round) {
        call.kv_heads = draw(1, 8);
        const int group = draw(1, 8);
        call.heads = call.kv_heads * group;
        call.head_size = 16 * draw(2, 16);
        call.rows = draw(1, 300);
        call.max_length = draw(1, 100);
        call.max_prefix = draw(0, 1) ? draw(0, 200000) : draw(0, 600);
        call.split_limit = draw(0, 4) ? 0 : draw(1, 9);
        CHECK(check_shapes(call) == NLD_OK);
        const LaunchPlan plan = launch_plan(call, 132, 227 * 1024);
        CHECK(plan.padded_head >= call.head_size && plan.padded_head % 32 == 0);
        CHECK(plan.m_tiles * plan.m_tile >= group * call.max_length);
        CHECK((plan.m_tiles - 1) * plan.m_tile < group * call.max_length);
        CHECK(plan.splits >= 1 && plan.splits <= kMostSplits && plan.shared_bytes <= 227 * 1024);
        if (call.split_limit) CHECK(plan.splits <= call.split_limit);
        if (plan.splits > 1) {
            CHECK(plan.splits * plan.m_tiles * plan.rows * plan.kv_heads <= 2 * 132);
            CHECK((plan.splits - 1) * kTokensPerSplit < call.max_prefix);
        }
    }
    call.head_size = 40;
    CHECK(check_shapes(call) == NLD_BAD_SHAPE);
    call.head_size = 64;
    call.cache_type = NLD_FLOAT16;
    CHECK(check_shapes(call) == NLD_BAD_TYPE);
}

void test_counting() {
    const int64_t drafts[] = {1, 2, 3, 4}, targets[] = {1, 2, 9, 4, 5};
    CHECK(count_accepted(drafts, targets, 4) == 2 && count_accepted(drafts, targets, 2) == 2);
    CHECK(count_accepted(drafts, targets, 0) == 0);
}

}  // namespace
}  // namespace nld

int main() {
    nld::test_pages();
    nld::test_folding();
    nld::test_tiles_cover_everything_once();
    nld::test_masks();
    nld::test_workspace_has_no_overlap();
    nld::test_merging();
    nld::test_layouts<uint16_t>();
    nld::test_layouts<float>();
    nld::test_rounding<nld::BFloat16>(7, -126);
    nld::test_rounding<nld::Float16>(10, -14);
    nld::test_float8();
    nld::test_launch_plans();
    nld::test_counting();
    printf("plans are right\n");
    return 0;
}
