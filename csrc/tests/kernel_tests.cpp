// Compares the CPU kernels with a double reference on random ragged batches, without torch. Built with AddressSanitizer
// and UndefinedBehaviorSanitizer (cmake -DVLLM_NLD_SANITIZE=ON). Buffers are exactly as large as they must be, and
// unused page slots are NaN, so that reading too far is detected.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "accept_prefix.h"
#include "best_tokens.h"
#include "block_attention.h"

namespace {

using nld::DType;

int failures = 0;

void fail(const char* what, const char* isa, int seed) {
    ++failures;
    std::printf("FAILED %s (%s, seed %d)\n", what, isa, seed);
}

void run_threads(int count, void (*body)(int, void*), void* context) {
    std::vector<std::thread> threads;
    for (int i = 1; i < count; ++i) threads.emplace_back(body, i, context);
    body(0, context);
    for (auto& thread : threads) thread.join();
}

// A value after it is stored, and the bytes it takes.
int bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : dtype >= DType::kFloat8E4M3 ? 1 : 2; }

// Values are eighths between -2 and 2: exact in every dtype, so stored values need no reference conversion.
double value_of(std::mt19937& random) { return std::uniform_int_distribution<int>(-8, 8)(random) / 4.0; }

void put(char* at, DType dtype, double value) {
    const float x = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 31, exponent = (bits >> 23) & 255, mantissa = bits & 0x7fffff;
    auto narrow = [&](int exponent_bits, int mantissa_bits) -> uint32_t {
        const int width = exponent_bits + mantissa_bits, bias = (1 << (exponent_bits - 1)) - 1;
        if (std::isnan(x)) return (1u << width) - 1;
        if (x == 0) return 0;
        return (sign << width) | ((exponent - 127 + bias) << mantissa_bits) | (mantissa >> (23 - mantissa_bits));
    };
    uint32_t stored = bits;
    if (dtype == DType::kBFloat16) stored = bits >> 16;
    if (dtype == DType::kFloat16) stored = narrow(5, 10);
    if (dtype == DType::kFloat8E4M3) stored = narrow(4, 3);
    if (dtype == DType::kFloat8E5M2) stored = narrow(5, 2);
    std::memcpy(at, &stored, bytes_of(dtype));
}

double get(const char* at, DType dtype) {
    uint32_t bits = 0;
    std::memcpy(&bits, at, bytes_of(dtype));
    if (dtype == DType::kBFloat16) bits <<= 16;
    if (dtype == DType::kFloat16) {
        const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
        const double magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                                 : exponent == 0 ? mantissa * 0x1p-24
                                                 : (1024 + mantissa) * std::ldexp(1.0, exponent - 25);
        return bits & 0x8000 ? -magnitude : magnitude;
    }
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// A heap block of exactly `size` bytes.
struct Buffer {
    std::unique_ptr<char[]> data;
    std::vector<double> values;
    explicit Buffer(size_t elements, int bytes) : data(new char[elements * bytes]), values(elements, NAN) {}
};

struct Case {
    int seed;
    DType dtype, cache;
    int rows, heads, kv_heads, dim, page_size, pages;
    bool columns;  // column-major key pages
    bool tiled;    // tiles of 16 by 2 instead
    std::vector<int32_t> table, prefixes, starts, kinds;
    int pages_per_row;
    std::unique_ptr<Buffer> query, key, value, key_pages, value_pages, output;  // the output's values are the reference
    nld::BlockAttention call;

    explicit Case(int seed_) : seed(seed_) {
        std::mt19937 random(seed);
        auto pick = [&](std::initializer_list<int> of) {
            return *(of.begin() + std::uniform_int_distribution<size_t>(0, of.size() - 1)(random));
        };
        dtype = static_cast<DType>(pick({0, 1, 2}));
        cache = pick({0, 0, 1}) ? static_cast<DType>(pick({3, 4})) : dtype;
        kv_heads = pick({1, 2, 3});
        heads = kv_heads * pick({1, 3, 4});
        dim = pick({16, 32, 48, 64, 80, 128, 256});
        page_size = pick({5, 16, 32, 128});
        columns = pick({0, 1});
        tiled = page_size % 16 == 0 && pick({0, 0, 1});
        rows = pick({1, 2, 4, 6});
        starts.push_back(0);
        for (int row = 0; row < rows; ++row) {
            prefixes.push_back(pick({0, 1, page_size, page_size + 3, 70, 200, 700}));
            starts.push_back(starts.back() + pick({0, 1, 2, 7, 16, 33, 90}));
            kinds.push_back(pick({0, 1}));
        }
        fill(random);
        compute_reference();
    }

    void fill(std::mt19937& random) {
        pages_per_row = 1;
        for (int prefix : prefixes) pages_per_row = std::max(pages_per_row, (prefix + page_size - 1) / page_size);
        pages = rows * pages_per_row;
        const int tokens = starts.back();
        table.assign(rows * pages_per_row, 1 << 30);
        auto fresh = [&](int count) {
            auto buffer = std::make_unique<Buffer>(static_cast<size_t>(tokens) * count * dim, bytes_of(dtype));
            for (size_t i = 0; i < buffer->values.size(); ++i)
                put(&buffer->data[i * bytes_of(dtype)], dtype, buffer->values[i] = value_of(random));
            return buffer;
        };
        query = fresh(heads);
        key = fresh(kv_heads);
        value = fresh(kv_heads);
        output = fresh(heads);
        key_pages = std::make_unique<Buffer>(size_t{1} * pages * kv_heads * page_size * dim, bytes_of(cache));
        value_pages = std::make_unique<Buffer>(size_t{1} * pages * kv_heads * page_size * dim, bytes_of(cache));
        call = nld::BlockAttention{};
        call.dtype = dtype;
        call.rows = rows, call.heads = heads, call.kv_heads = kv_heads, call.head_dim = dim, call.page_size = page_size;
        const int64_t head = int64_t{page_size} * dim;
        call.key_pages = {key_pages->data.get(),   cache, kv_heads * head, head, columns ? 1 : dim,
                          columns ? page_size : 1, 1};
        call.value_pages = {value_pages->data.get(), cache, kv_heads * head, head, dim, 1, 1};
        if (tiled) {
            call.key_pages = {key_pages->data.get(), cache, kv_heads * head, head, 2, 1, 1, 16, 2, 16 * dim, 32};
            call.value_pages = {value_pages->data.get(), cache, kv_heads * head, head, 1, 2, 1, 2, 16, 32,
                                16 * page_size};
        }
        if (cache != dtype) call.key_pages.scale = 0.5f, call.value_pages.scale = 2.0f;
        for (const auto* pool : {&call.key_pages, &call.value_pages}) {
            Buffer& buffer = pool == &call.key_pages ? *key_pages : *value_pages;
            for (size_t i = 0; i < buffer.values.size(); ++i) put(&buffer.data[i * bytes_of(cache)], cache, NAN);
        }
        fill_pages(random);
        call.query = {query->data.get(), int64_t{heads} * dim, dim};
        call.key = {key->data.get(), int64_t{kv_heads} * dim, dim};
        call.value = {value->data.get(), int64_t{kv_heads} * dim, dim};
        call.output = {output->data.get(), int64_t{heads} * dim, dim};
        call.block_table = table.data(), call.table_stride = pages_per_row;
        call.prefix_lens = prefixes.data(), call.block_starts = starts.data(), call.mask_kinds = kinds.data();
        call.scale = 0.25f;
    }

    void fill_pages(std::mt19937& random) {
        int next = pages;
        for (int row = 0; row < rows; ++row) {
            for (int t = 0; t < prefixes[row]; ++t) {
                int32_t& page = table[row * pages_per_row + t / page_size];
                if (t % page_size == 0) page = --next;
                for (int h = 0; h < kv_heads; ++h) {
                    for (int d = 0; d < dim; ++d) {
                        set(call.key_pages, *key_pages, slot(call.key_pages, page, h, t % page_size, d), random);
                        set(call.value_pages, *value_pages, slot(call.value_pages, page, h, t % page_size, d), random);
                    }
                }
            }
        }
    }

    static size_t slot(const nld::Pages& p, int page, int head, int token, int d) {
        const size_t start = page * p.page + head * p.head;
        if (!p.tiled()) return start + token * p.token + d * p.dim;
        return start + token / p.tokens * p.token_group + token % p.tokens * p.token + d / p.dims * p.dim_group +
               d % p.dims * p.dim;
    }

    void set(const nld::Pages& pool, Buffer& buffer, size_t at, std::mt19937& random) {
        buffer.values[at] = value_of(random);
        put(&buffer.data[at * bytes_of(cache)], cache, buffer.values[at]);
        buffer.values[at] *= pool.scale;
    }

    bool sees(int row, int query_token, int key_token) const {
        if (key_token < prefixes[row]) return true;
        const int other = key_token - prefixes[row];
        return kinds[row] == nld::kAll || other <= query_token;
    }

    double at(const Buffer& pool, const nld::Pages& pages_, const Buffer& fresh_, int row, int t, int h, int d) const {
        if (t >= prefixes[row])
            return fresh_.values[(size_t(starts[row] + t - prefixes[row]) * kv_heads + h) * dim + d];
        return pool.values[slot(pages_, table[row * pages_per_row + t / page_size], h, t % page_size, d)];
    }

    void compute_reference() {
        for (int row = 0; row < rows; ++row) {
            const int length = starts[row + 1] - starts[row], keys = prefixes[row] + length;
            for (int q = 0; q < length; ++q)
                for (int h = 0; h < heads; ++h) compute_reference(row, q, h, keys);
        }
    }

    void compute_reference(int row, int q, int h, int keys) {
        const size_t place = (size_t(starts[row] + q) * heads + h) * dim;
        std::vector<double> weights(keys, 0.0), out(dim, 0.0);
        const int kv = h / (heads / kv_heads);
        double top = -INFINITY, sum = 0;
        for (int t = 0; t < keys; ++t) {
            if (!sees(row, q, t)) continue;
            for (int d = 0; d < dim; ++d)
                weights[t] += query->values[place + d] * at(*key_pages, call.key_pages, *key, row, t, kv, d);
            top = std::max(top, weights[t]);
        }
        for (int t = 0; t < keys; ++t) {
            weights[t] = sees(row, q, t) ? std::exp((weights[t] - top) * call.scale) : 0.0;
            sum += weights[t];
            for (int d = 0; weights[t] > 0 && d < dim; ++d)
                out[d] += weights[t] * at(*value_pages, call.value_pages, *value, row, t, kv, d);
        }
        for (int d = 0; d < dim; ++d) output->values[place + d] = sum > 0 ? out[d] / sum : 0.0;
    }

    void forget_output() { std::memset(output->data.get(), 0xff, output->values.size() * bytes_of(dtype)); }

    // Largest error over all outputs; everything is written.
    double error() const {
        double worst = 0;
        for (size_t i = 0; i < output->values.size(); ++i) {
            const double difference = std::fabs(get(&output->data[i * bytes_of(dtype)], dtype) - output->values[i]);
            worst = std::isnan(difference) ? INFINITY : std::max(worst, difference);
        }
        return worst;
    }
};

void test_attention(const char* isa, std::vector<Case>& batches) {
    for (Case& test : batches) {
        const double allowed = test.dtype == DType::kFloat32 ? 2e-5 : test.dtype == DType::kFloat16 ? 4e-3 : 3e-2;
        for (int threads : {1, 2, 7}) {
            test.forget_output();
            nld::Workspace workspace;
            nld::block_attention(test.call, threads, run_threads, workspace);
            const double error = test.error();
            if (!(error <= allowed)) {
                std::printf("error %g, allowed %g, threads %d\n", error, allowed, threads);
                fail("attention", isa, test.seed);
            }
        }
    }
}

// Rows of logits lie end to end in a block that ends with the last one.
struct Logits {
    DType dtype;
    int64_t rows, vocab;
    Buffer buffer;

    Logits(DType dtype_, int64_t rows_, int64_t vocab_, std::mt19937& random)
        : dtype(dtype_), rows(rows_), vocab(vocab_), buffer(rows_ * vocab_, bytes_of(dtype_)) {
        const bool hidden = random() % 4 == 0;  // only what follows is visible
        for (int64_t i = 0; i < rows * vocab; ++i) set(i, hidden ? -INFINITY : 4 * value_of(random));
        if (random() % 2 == 0) set(random() % (rows * vocab), 9.0);
        if (random() % 3 == 0) set(random() % (rows * vocab), NAN);
    }

    void set(int64_t i, double value) {
        buffer.values[i] = value;
        // put() knows only finite numbers and NaN
        const uint16_t half = 0xfc00;
        if (dtype == DType::kFloat16 && std::isinf(value))
            std::memcpy(&buffer.data[i * 2], &half, 2);
        else
            put(&buffer.data[i * bytes_of(dtype)], dtype, value);
    }

    bool right(const int64_t* tokens, const float* largest, const float* normalizers) const {
        for (int64_t row = 0; row < rows; ++row) {
            const double* logits = &buffer.values[row * vocab];
            int64_t best = 0;
            for (int64_t i = 1; i < vocab; ++i)
                if (!std::isnan(logits[best]) && !(logits[i] <= logits[best])) best = i;
            double sum = 0;
            for (int64_t i = 0; i < vocab; ++i) sum += std::exp(logits[i] - logits[best]);
            const double expected = std::isinf(logits[best]) ? logits[best] : logits[best] + std::log(sum);
            auto same = [](double a, double b) { return a == b || std::fabs(a - b) < 1e-5 || (a != a && b != b); };
            if (tokens[row] != best || !same(largest[row], logits[best])) return false;
            if (normalizers != nullptr && !same(normalizers[row], expected)) return false;
        }
        return true;
    }
};

void test_best_tokens(const char* isa, int cases) {
    for (int seed = 0; seed < cases; ++seed) {
        std::mt19937 random(seed);
        const int64_t sizes[] = {1, 15, 64, 67, 1000, nld::kSegment - 1, nld::kSegment + 5};
        const Logits logits(static_cast<DType>(random() % 3), 1 + random() % 3, sizes[random() % 7], random);
        for (int threads : {1, 2, 7}) {
            for (bool with_normalizers : {true, false}) {
                std::vector<int64_t> tokens(logits.rows);
                std::vector<float> largest(logits.rows), normalizers(logits.rows);
                float* wanted = with_normalizers ? normalizers.data() : nullptr;
                nld::best_tokens({logits.buffer.data.get(), logits.dtype, logits.rows, logits.vocab, logits.vocab,
                                  tokens.data(), largest.data(), wanted},
                                 threads, run_threads);
                if (!logits.right(tokens.data(), largest.data(), wanted)) fail("best_tokens", isa, seed);
            }
        }
    }
}

void test_accept_prefix() {
    const std::vector<int64_t> drafts = {9, 2, 3, 6, 7, 8}, targets = {8, 2, 3, 0, 6, 7, 8, 9, 3};
    const std::vector<int32_t> starts = {0, 3, 6, 6};
    std::vector<int32_t> accepted(3), token_starts(4);
    std::vector<int64_t> tokens(9), seeds(3);
    nld::accept_prefix({3, drafts.data(), targets.data(), starts.data(), accepted.data(), token_starts.data(),
                        tokens.data(), seeds.data()});
    const bool right = accepted == std::vector<int32_t>{0, 3, 0} && token_starts == std::vector<int32_t>{0, 1, 5, 6} &&
                       tokens == std::vector<int64_t>{8, 6, 7, 8, 9, 3, -1, -1, -1} &&
                       seeds == std::vector<int64_t>{8, 9, 3};
    if (!right) fail("accept_prefix", "-", 0);
}

}  // namespace

int main(int argc, char** argv) {
    const int cases = argc > 1 ? std::atoi(argv[1]) : 40;
    std::vector<Case> batches;
    for (int seed = 0; seed < cases; ++seed) batches.emplace_back(seed);
    for (const nld::Isa& isa : nld::instruction_sets()) {
        if (!nld::force_isa(isa.name)) {
            std::printf("%s: not on this machine\n", isa.name);
            continue;
        }
        test_attention(isa.name, batches);
        test_best_tokens(isa.name, 4 * cases);
        std::printf("%s: %d cases\n", isa.name, cases);
    }
    test_accept_prefix();
    std::printf("%d failures\n", failures);
    return failures != 0;
}
