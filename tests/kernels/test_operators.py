"""Every implementation of the operators in ``docs/operators.md``, on the same random ragged batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.kernels import cases
from tests.kernels.implementations import Implementation, having
from vllm_nld.errors import NLDError

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


@pytest.mark.parametrize(("implementation", "device"), having("block_attention"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", cases.EDGE_SPECS)
def test_attention_edges(implementation: Implementation, device: str, dtype: torch.dtype, name: str) -> None:
    module = implementation.load(device)
    if dtype in implementation.dtypes:
        cases.check(module, cases.EDGE_SPECS[name], dtype, device)


@pytest.mark.parametrize(("implementation", "device"), having("block_attention"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", cases.TILED_SPECS)
def test_attention_over_tiles(implementation: Implementation, device: str, dtype: torch.dtype, name: str) -> None:
    """Only the implementations for CPUs read pages in tiles; the others refuse them with a message."""
    module, spec = implementation.load(device), cases.TILED_SPECS[name]
    if implementation.tiles:
        cases.check(module, spec, dtype, device)
    elif dtype in implementation.dtypes:
        with pytest.raises(NLDError, match="tiles"):
            module.block_attention(**cases.attention_arguments(spec, dtype, device))


@pytest.mark.parametrize(("implementation", "device"), having("block_attention"))
def test_attention(implementation: Implementation, device: str) -> None:
    module = implementation.load(device)
    specs = cases.attention_specs(implementation.longest_prefix, tiles=implementation.tiles)
    drawn = st.tuples(specs, st.sampled_from(implementation.dtypes))
    run_examples(implementation.examples, drawn, lambda pair: cases.check(module, *pair, device))


@pytest.mark.parametrize(("implementation", "device"), having("block_attention"))
@pytest.mark.parametrize("name", ["long row next to short ones", "all masks"])
def test_attention_is_deterministic(implementation: Implementation, device: str, name: str) -> None:
    module = implementation.load(device)
    cases.check_deterministic(module, cases.EDGE_SPECS[name], torch.bfloat16, device, implementation.repeats)


@pytest.mark.parametrize(("implementation", "device"), having("accept_prefix"))
def test_accept_prefix(implementation: Implementation, device: str) -> None:
    module = implementation.load(device)
    run_examples(implementation.examples, cases.accept_specs(), lambda spec: cases.check_accept(module, spec, device))


@pytest.mark.parametrize(("implementation", "device"), having("best_tokens"))
@pytest.mark.parametrize("name", cases.BEST_SPECS)
def test_best_tokens_edges(implementation: Implementation, device: str, name: str) -> None:
    cases.check_best(implementation.load(device), cases.BEST_SPECS[name], device)


@pytest.mark.parametrize(("implementation", "device"), having("best_tokens"))
def test_best_tokens_of_unaligned_rows(implementation: Implementation, device: str) -> None:
    module = implementation.load(device)
    cases.check_best_anywhere(module, device)
    cases.check_best_alone(module, device)


@pytest.mark.parametrize(("implementation", "device"), having("best_tokens"))
def test_best_tokens(implementation: Implementation, device: str) -> None:
    module = implementation.load(device)
    specs = cases.best_specs(2 * (cases.GPU_SEGMENT if implementation.interpreted else cases.SEGMENT))
    run_examples(implementation.examples, specs, lambda spec: cases.check_best(module, spec, device))


@pytest.mark.parametrize(("implementation", "device"), having("move_kv"))
def test_move_kv(implementation: Implementation, device: str) -> None:
    module = implementation.load(device)
    run_examples(implementation.examples, cases.move_specs(), lambda spec: cases.check_move(module, spec, device))
