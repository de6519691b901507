// Which drafts each row accepts. docs/developer/operators.md says what the arguments mean.
#pragma once

#include <cstdint>

namespace nld {

struct AcceptPrefix {
    int rows;
    const int64_t *drafts, *targets;
    const int32_t* starts;
    int32_t *accepted, *token_starts;
    int64_t *tokens, *seeds;
};

void accept_prefix(const AcceptPrefix& call);

}  // namespace nld
