"""Tests only for the C++ operators: instruction sets, unsuitable input, torch's checks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels import cases
from tests.kernels.test_operators import run_examples
from vllm_nld.ops import BlockAttention, cpp_ops

CPU = torch.device("cpu")
REASON = cpp_ops.unavailable(CPU)
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"C++ operators: {REASON}")
INSTRUCTION_SETS = ("avx512bf16", "avx512", "avx2", "portable")


@pytest.fixture(params=INSTRUCTION_SETS)
def forced(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        cpp_ops.instruction_set(request.param)
    except RuntimeError:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    cpp_ops.instruction_set("")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*cases.EDGE_SPECS, *cases.TILED_SPECS])
def test_every_instruction_set(forced: str, name: str, dtype: torch.dtype) -> None:
    cases.check(cpp_ops, (cases.EDGE_SPECS | cases.TILED_SPECS)[name], dtype)


def test_fastest_instruction_set_is_chosen() -> None:
    """Intel's products of bfloat16 pairs are slower than those of float32 (csrc/cpu/instruction_sets.cpp)."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        pytest.skip("no /proc/cpuinfo")
    flags = cpuinfo.split("flags", 1)[-1].split("\n", 1)[0].split()
    wanted = "avx2" if "avx2" in flags else "portable"
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= set(flags):
        wanted = "avx512bf16" if "avx512_bf16" in flags and "GenuineIntel" not in cpuinfo else "avx512"
    assert cpp_ops.instruction_set("") == wanted


def test_very_long_row_next_to_short_ones() -> None:
    """32k cached tokens, split over all threads, next to rows that fit a tile."""
    spec = cases.AttentionSpec((32_700, 0, 40), (16, 3, 1), (0, 1, 0), heads=(4, 1), page_size=128, layout=0)
    cases.check(cpp_ops, spec, torch.bfloat16)
    cases.check_deterministic(cpp_ops, spec, torch.bfloat16)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads(threads: int) -> None:
    """Threads' ranges of work end inside items, several times in one item with many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name in ("one long row", "long row next to short ones", "both masks", "nothing fresh"):
            cases.check(cpp_ops, cases.EDGE_SPECS[name], torch.float32)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", cases.BEST_SPECS)
def test_best_tokens_by_every_instruction_set(forced: str, name: str) -> None:
    cases.check_best(cpp_ops, cases.BEST_SPECS[name])


def test_random_best_tokens_by_every_instruction_set(forced: str) -> None:
    run_examples(50, cases.best_specs(), lambda spec: cases.check_best(cpp_ops, spec))


def test_every_float16_is_widened(forced: str) -> None:
    """A row per value, each of 131 equal columns: whole vectors, and the rest that is converted one by one."""
    values = torch.arange(1 << 16).to(torch.uint16).view(torch.float16)
    for first, last in ((0, 128), (128, 131)):
        logits = torch.full((len(values), 131), -torch.inf, dtype=torch.float16)
        logits[:, first:last] = values[:, None]
        largest = cpp_ops.best_tokens(logits, False)[1]
        torch.testing.assert_close(largest, values.float(), rtol=0, atol=0, equal_nan=True)


def test_best_tokens_do_not_depend_on_threads_or_batch(forced: str) -> None:
    logits = cases.BestSpec(9, 3 * cases.SEGMENT + 77, torch.bfloat16).logits()
    expected = cpp_ops.best_tokens(logits)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7, 2, 1):
            torch.set_num_threads(threads)
            for rows in (slice(None), slice(4, 5), slice(2, 9, 3)):
                for x, y in zip(cpp_ops.best_tokens(logits[rows]), expected, strict=True):
                    assert torch.equal(cases.bits(x), cases.bits(y[rows]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(3), "best_tokens: logits has 1 dimensions; needed: 2"),
        (torch.zeros(3, 0), "best_tokens: logits has no columns; needed: 1 or more"),
        (torch.zeros(3, 8)[:, ::2], "best_tokens: logits has inner stride 2; needed: 1"),
        (torch.zeros(8, 3).t(), "best_tokens: logits has inner stride 3; needed: 1"),
        (torch.zeros(3, 8, dtype=torch.float64), "best_tokens: dtype of logits is not supported; allowed: float32"),
        (torch.zeros(3, 8, dtype=torch.float8_e5m2), "best_tokens: logits is float8; allowed: float32"),
    ],
)
def test_unsuitable_logits_are_an_error(logits: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        cpp_ops.best_tokens(logits)


def spoiled(**changes: Any) -> BlockAttention:
    """Arguments of a small valid call with some of them replaced; functions are given the valid one."""
    call = cases.attention_arguments(cases.AttentionSpec((20, 3), (4, 2), (0, 1)), torch.float32)
    return call._replace(
        **{name: change(getattr(call, name)) if callable(change) else change for name, change in changes.items()}
    )


def with_entry(index: Any, value: int) -> Any:
    def change(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[index] = value
        return x

    return change


def in_tiles(tokens: tuple[int, int], dims: tuple[int, int]) -> Any:
    """Pages of groups and tokens, groups and dimensions."""
    return lambda x: x.new_zeros(len(x), 2, *tokens, *dims)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_table": with_entry((0, 1), 99)}, r"block_table\[0, 1\] is 99; allowed: 0 to"),
        ({"block_table": with_entry((0, 0), -1)}, r"block_table\[0, 0\] is -1"),
        ({"block_table": lambda x: x.long()}, "block_table must be int32"),
        ({"block_table": lambda x: x[:1]}, "block_table must have 2 dimension"),
        ({"prefix_lens": with_entry(1, -1)}, r"prefix_lens\[1\] is -1"),
        ({"prefix_lens": with_entry(1, 10_000)}, r"prefix_lens\[1\] is 10000; allowed: 0 to"),
        ({"block_starts": with_entry(2, 7)}, r"block_starts\[2\] is 7; allowed: 4 to 6"),
        ({"block_starts": with_entry(1, 9)}, r"block_starts\[1\] is 9"),
        ({"block_starts": with_entry(0, -2)}, r"block_starts\[0\] is -2"),
        ({"mask_kinds": with_entry(0, 2)}, r"mask_kinds\[0\] is 2; allowed: 0 \(all\), 1 \(causal\)"),
        ({"mask_kinds": with_entry(1, -1)}, r"mask_kinds\[1\] is -1"),
        ({"query": lambda x: x.double()}, "dtype of query is not supported; allowed: float32"),
        ({"key": lambda x: x.bfloat16()}, "dtype of key differs"),
        ({"output": lambda x: x.half()}, "dtype of output differs"),
        ({"query": lambda x: x[..., :40]}, "head size is 40; allowed: multiples of 16"),
        ({"query": lambda x: x[:, :0], "output": lambda x: x[:, :0]}, "0 query heads and 2 KV heads"),
        ({"query": lambda x: x[:, :1].expand(-1, 514, -1)}, "514 query heads and 2 KV heads; allowed: .* at most 256"),
        ({"query": lambda x: x[0]}, "query has 2 dimensions; needed: 3"),
        ({"query": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)}, "query has inner stride"),
        ({"value": lambda x: x[:, :1]}, "value has shape"),
        ({"key_pages": lambda x: x.bfloat16()}, "differ in shape or dtype"),
        ({"key_pages": lambda x: x[:, :, :8]}, "differ in shape or dtype"),
        ({"key_pages": lambda x: x.flatten(1, 2)}, "key_pages has 3 dimensions; needed: 4"),
        ({"key_pages": lambda x: x.unflatten(2, (2, 8))}, "key_pages has 5 dimensions; needed: 4, or 6 in tiles"),
        ({"key_pages": in_tiles((2, 8), (16, 2))}, r"key_pages has shape \[pages, 2, 16, 32\]; needed: .* 64\]"),
        ({"key_pages": in_tiles((1, 5), (32, 2))}, "key_pages are of 5 tokens by 2 dimensions; allowed: divisors"),
        ({"key_pages": in_tiles((1, 16), (64, 1))}, "key_pages are of 16 tokens by 1 dimensions; allowed"),
        ({"value_pages": in_tiles((2, 16), (4, 16))}, "differ in shape or dtype"),
        ({"scale": 0.0}, "scale is 0"),
    ],
)  # fmt: skip
def test_unsuitable_input_is_an_error(changes: dict[str, Any], message: str) -> None:
    call = spoiled(**changes)
    with pytest.raises(RuntimeError, match=message):
        cpp_ops.block_attention(call)
    assert call.output.isnan().all(), "something was written"


@pytest.mark.parametrize(
    ("drafts", "targets", "starts", "message"),
    [
        ([1, 2], [1, 2], [0, 2], "targets has 2 entries; needed: 3"),
        ([1, 2], [1, 2, 3], [0, 1], "starts must go from 0 to 2"),
        ([1, 2], [1, 2, 3, 4, 5], [0, 3, 1, 2], r"starts\[2\] is 1; allowed: 3 or more"),
    ],
)
def test_unsuitable_drafts_are_an_error(drafts: Any, targets: Any, starts: Any, message: str) -> None:
    arguments = torch.tensor(drafts), torch.tensor(targets), torch.tensor(starts, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=message):
        cpp_ops.accept_prefix(*arguments)


def test_operators_write_only_what_their_schemas_declare() -> None:
    call = cases.attention_arguments(cases.EDGE_SPECS["both masks"], torch.float32)
    accept = torch.tensor([1, 2, 3]), torch.tensor([1, 5, 3, 4, 9]), torch.tensor([0, 2, 3], dtype=torch.int32)
    call.output.zero_()  # NaN is unequal to itself
    library = torch.ops.vllm_nld_cpu
    torch.library.opcheck(library.block_attention.default, call[: cpp_ops.ARGUMENTS], test_utils="test_schema")
    torch.library.opcheck(library.accept_prefix.default, accept, test_utils="test_schema")
    for with_normalizer in (True, False):
        arguments = torch.randn(3, 100), with_normalizer
        torch.library.opcheck(library.best_tokens.default, arguments, test_utils="test_schema")


def test_schema_has_the_fields_of_the_arguments_in_order() -> None:
    """They are passed by position."""
    schema = torch.ops.vllm_nld_cpu.block_attention.default._schema
    assert tuple(argument.name for argument in schema.arguments) == BlockAttention._fields[: cpp_ops.ARGUMENTS]


def test_library_of_another_version_is_reported_without_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """An editable install keeps its compiled part until it is installed again."""
    monkeypatch.setattr(cpp_ops, "ABI_VERSION", cpp_ops.ABI_VERSION + 1)
    reason = cpp_ops._load.__wrapped__()  # its result is cached once per process
    assert f"have version {cpp_ops.ABI_VERSION - 1}, needed is {cpp_ops.ABI_VERSION}" in reason
    assert reason.endswith("install vllm-nld again")
    monkeypatch.setattr(cpp_ops, "_load", lambda: reason)
    with pytest.raises(RuntimeError, match="install vllm-nld again"):
        cpp_ops.instruction_set()


def test_library_without_a_version_counts_as_version_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "vllm_nld_cpu", object())
    assert "have version 1, needed" in cpp_ops._load.__wrapped__()
