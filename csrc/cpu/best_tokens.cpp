#include "best_tokens.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace nld {

namespace {

struct Search {
    const BestTokens& call;
    const Isa& isa;
    std::vector<BestPart>& parts;  // [rows, segments]
    int64_t segments;
    int threads;
};

void search_some(int thread, void* context) {
    const Search& search = *static_cast<Search*>(context);
    const int64_t all = static_cast<int64_t>(search.parts.size());
    for (int64_t i = all * thread / search.threads; i < all * (thread + 1) / search.threads; ++i)
        search.isa.segment(search.call, i / search.segments, i % search.segments, search.parts[i]);
}

void write_row(const BestTokens& call, int64_t row, const BestPart* parts, int64_t segments) {
    const BestPart* best = parts;
    for (const BestPart* part = parts + 1; part < parts + segments; ++part)
        if (!std::isnan(best->largest) && !(part->largest <= best->largest)) best = part;
    call.tokens[row] = best->token;
    call.largest[row] = best->largest;
    if (call.normalizers == nullptr) return;
    call.normalizers[row] = best->largest;  // infinity or NaN replaces the whole sum
    if (!std::isfinite(best->largest)) return;
    double sum = 0;
    for (const BestPart* part = parts; part < parts + segments; ++part)
        sum += part->sum * std::exp(double{part->largest} - best->largest);
    call.normalizers[row] = static_cast<float>(best->largest + std::log(sum));
}

}  // namespace

void best_tokens(const BestTokens& call, int threads, ParallelFor parallel) {
    if (call.rows == 0) return;
    const int64_t segments = (call.vocab + kSegment - 1) / kSegment;
    std::vector<BestPart> parts(call.rows * segments);
    const int workers = static_cast<int>(std::min<int64_t>(threads, call.rows * segments));
    Search search{call, choose_isa(call.dtype), parts, segments, workers};
    parallel(workers, search_some, &search);
    for (int64_t row = 0; row < call.rows; ++row) write_row(call, row, &parts[row * segments], segments);
}

}  // namespace nld
