"""Every implementation of the operators in ``docs/developer/operators.md``, on the same random ragged batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.kernels import cases
from tests.kernels.implementations import INTERPRETED, effort, having, skip_unless_usable
from vllm_nld.errors import NLDError
from vllm_nld.ops import Implementation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run_examples(count: int, strategy: st.SearchStrategy, body) -> None:  # type: ignore[no-untyped-def]
    """Run ``body`` on drawn examples. Their number depends on the implementation, so only the test knows it."""
    quiet = settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    quiet(given(strategy)(body))()


@pytest.fixture(autouse=True)
def usable(implementation: Implementation, device: str) -> None:
    skip_unless_usable(implementation, device)


@pytest.mark.parametrize(("implementation", "device"), having("block_attention"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", cases.EDGE_SPECS)
def test_attention_edges(implementation: Implementation, device: str, dtype: torch.dtype, name: str) -> None:
    if dtype in implementation.dtypes:
        cases.check(implementation, cases.EDGE_SPECS[name], dtype, device)


@pytest.mark.parametrize(("implementation", "device"), having("block_attention"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", cases.TILED_SPECS)
def test_attention_over_tiles(implementation: Implementation, device: str, dtype: torch.dtype, name: str) -> None:
    """Some implementations read pages in tiles; the others refuse them with a message."""
    spec = cases.TILED_SPECS[name]
    if implementation.reads_tiles:
        cases.check(implementation, spec, dtype, device)
    elif dtype in implementation.dtypes:
        with pytest.raises(NLDError, match="tiles"):
            implementation.block_attention(cases.attention_arguments(spec, dtype, device))


@pytest.mark.parametrize(("implementation", "device"), having("block_attention"))
@pytest.mark.parametrize("name", cases.HEAD_SCALE_SPECS)
def test_float8_scales_by_head(implementation: Implementation, device: str, name: str) -> None:
    """Most implementations take a scale for each KV head; C++ refuses them with a message."""
    spec = cases.HEAD_SCALE_SPECS[name]
    if implementation.reads_head_scales:
        cases.check(implementation, spec, torch.bfloat16, device)
        return
    with pytest.raises(NLDError, match="k_scales"):
        implementation.block_attention(cases.attention_arguments(spec, torch.bfloat16, device))


@pytest.mark.parametrize(("implementation", "device"), having("block_attention"))
def test_attention(implementation: Implementation, device: str) -> None:
    budget = effort(implementation)
    specs = cases.attention_specs(
        budget.longest_prefix, tiles=implementation.reads_tiles, by_head=implementation.reads_head_scales
    )
    drawn = st.tuples(specs, st.sampled_from(implementation.dtypes))
    run_examples(budget.examples, drawn, lambda pair: cases.check(implementation, *pair, device))


@pytest.mark.parametrize(("implementation", "device"), having("block_attention"))
@pytest.mark.parametrize("name", ["long row next to short ones", "both masks"])
def test_attention_is_deterministic(implementation: Implementation, device: str, name: str) -> None:
    runs = effort(implementation).repeats
    cases.check_deterministic(implementation, cases.EDGE_SPECS[name], torch.bfloat16, device, runs)


@pytest.mark.parametrize(("implementation", "device"), having("accept_prefix"))
def test_accept_prefix(implementation: Implementation, device: str) -> None:
    examples = effort(implementation).examples
    run_examples(examples, cases.accept_specs(), lambda spec: cases.check_accept(implementation, spec, device))


@pytest.mark.parametrize(("implementation", "device"), having("best_tokens"))
@pytest.mark.parametrize("name", cases.BEST_SPECS)
def test_best_tokens_edges(implementation: Implementation, device: str, name: str) -> None:
    cases.check_best(implementation, cases.BEST_SPECS[name], device)


@pytest.mark.parametrize(("implementation", "device"), having("best_tokens"))
def test_best_tokens_of_unaligned_rows(implementation: Implementation, device: str) -> None:
    cases.check_best_anywhere(implementation, device)
    cases.check_best_alone(implementation, device)


@pytest.mark.parametrize(("implementation", "device"), having("best_tokens"))
def test_best_tokens(implementation: Implementation, device: str) -> None:
    specs = cases.best_specs(2 * (cases.GPU_SEGMENT if implementation.name in INTERPRETED else cases.SEGMENT))
    examples = effort(implementation).examples
    run_examples(examples, specs, lambda spec: cases.check_best(implementation, spec, device))
