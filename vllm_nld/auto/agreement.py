"""One decision for all tensor-parallel ranks.

Every rank runs the same proposer on the same tokens, so nearly everything comes out the same everywhere. What a clock
decides does not, and ranks that disagree on a block's length wait for each other forever, in different collectives.
The first rank makes such decisions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from vllm.distributed import get_tp_group

Decision = TypeVar("Decision")


def first_rank_decides(decide: Callable[[], Decision]) -> Decision:
    """Return on every rank what ``decide()`` returns on the first; it is called only there.

    Every rank must call this at the same point. The others wait for the first, as they would in the next collective
    anyway. One small pickled message through vLLM's message queue (shared memory within a node): no device is involved.
    """
    group = get_tp_group()
    if group.world_size == 1:
        return decide()
    decision: Decision = group.broadcast_object(decide() if group.rank_in_group == 0 else None, src=0)
    return decision
