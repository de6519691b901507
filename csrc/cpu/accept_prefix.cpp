#include "accept_prefix.h"

#include <algorithm>

namespace nld {

void accept_prefix(const AcceptPrefix& call) {
    int64_t* out = call.tokens;
    call.token_starts[0] = 0;
    for (int row = 0; row < call.rows; ++row) {
        const int first = call.starts[row], count = call.starts[row + 1] - first;
        const int64_t *drafts = call.drafts + first, *targets = call.targets + first + row;
        const int accepted = static_cast<int>(std::mismatch(drafts, drafts + count, targets).first - drafts);
        out = std::copy(targets, targets + accepted + 1, out);
        call.accepted[row] = accepted;
        call.seeds[row] = targets[accepted];
        call.token_starts[row + 1] = static_cast<int32_t>(out - call.tokens);
    }
    std::fill(out, call.tokens + call.starts[call.rows] + call.rows, int64_t{-1});
}

}  // namespace nld
