"""Steps of single tokens find a full CUDA graph besides those of whole blocks, in vLLM's own manager."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

from vllm_nld.vllm_glue.second_runner import add_graphs_of_single_tokens

BLOCK, REQUESTS = 8, 6


def manager(mode: CUDAGraphMode, block: int = BLOCK) -> Any:
    """vLLM's manager as it plans, without a device; graphs count as captured."""
    own = object.__new__(CudaGraphManager)
    speculative = SimpleNamespace(uses_dynamic_speculative_decoding=lambda: False)
    values = {
        "vllm_config": SimpleNamespace(
            speculative_config=speculative,
            num_speculative_tokens=block - 1,
            cache_config=SimpleNamespace(use_kda_recoverssm=False),
        ),
        "compilation_config": SimpleNamespace(
            cudagraph_capture_sizes=[1, 2, 4, 8, 16, 32, 64], max_cudagraph_capture_size=64
        ),
        "max_num_reqs": REQUESTS,
        "cudagraph_mode": mode,
        "decode_query_len": block,
        "lora_capture_cases": [0],
        "use_breakable_cg": False,
        "varlen_decode": False,
        "ubatch_runner": None,
        "_lora_dispatch_map": {},
        "_max_lora_case": 0,
        "_candidates": {},
        "_capture_descs": {},
        "_graphs_captured": True,
    }
    for name, value in values.items():
        setattr(own, name, value)
    own._init_candidates()
    return own


def found(own: Any, requests: int, tokens: int) -> tuple[str, int]:
    """The mode of the graph that a uniform step gets, and its tokens."""
    step = own.dispatch(requests, tokens, tokens // requests, 0)
    return step.cg_mode.name, step.num_tokens


def test_steps_of_single_tokens_run_in_full_graphs() -> None:
    own = manager(CUDAGraphMode.FULL_AND_PIECEWISE)
    assert [found(own, n, n)[0] for n in (1, 3)] == ["PIECEWISE", "PIECEWISE"]
    blocks = [found(own, n, n * BLOCK) for n in range(1, REQUESTS + 1)]
    assert add_graphs_of_single_tokens(own) == 4  # of 1, 2, 4, and of as many as there can be
    assert [found(own, n, n) for n in (1, 2, 3, 4, 5)] == [("FULL", size) for size in (1, 2, 4, 4, 6)]
    assert [found(own, n, n * BLOCK) for n in range(1, REQUESTS + 1)] == blocks
    assert own.dispatch(2, 4, None, 0).cg_mode.name == "PIECEWISE"  # a step of one and three tokens
    planned = [step.num_tokens for step in own._capture_descs[CUDAGraphMode.FULL]]
    assert planned == sorted(planned, reverse=True)
    assert add_graphs_of_single_tokens(own) == 0


@pytest.mark.parametrize("mode", [CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL])
def test_nothing_is_added_where_blocks_have_no_graphs_of_their_own(mode: CUDAGraphMode) -> None:
    own = manager(mode)
    before = dict(own._candidates)
    assert add_graphs_of_single_tokens(own) == 0
    assert own._candidates == before


def test_nothing_is_added_without_drafts() -> None:
    assert add_graphs_of_single_tokens(manager(CUDAGraphMode.FULL_AND_PIECEWISE, block=1)) == 0
