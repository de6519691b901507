"""What a CUDA graph needs of a draft pass, as far as a CPU can tell: fixed buffers, harmless padding, no waiting."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.support.engines import generate, random_prompts, runner
from tests.support.models import random_model, save, small_config
from tests.support.second_runner import second_engine
from vllm_nld.reference import ReferenceModel, ar_generate
from vllm_nld.reference.generate import draft_block
from vllm_nld.reference.model import KVCache

VOCAB = 24


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    return random_model(small_config(), 6)


@pytest.fixture(scope="module")
def llm(model: ReferenceModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with second_engine(save(model, tmp_path_factory.mktemp("graphs"))) as llm:
        yield llm


class Recorded:
    """Stands for CUDA graphs: what was fixed at capture runs again, with nothing of the step but what buffers hold."""

    def __init__(self, passes: dict[int, Callable[[], None]]) -> None:
        self.passes, self.replayed = passes, list[int]()

    def slots_for(self, requests: int) -> int | None:
        return min((slots for slots in self.passes if slots >= requests), default=None)

    def replay(self, slots: int) -> None:
        self.replayed.append(slots)
        self.passes[slots]()


def test_a_recorded_pass_serves_every_step(llm: Any, model: ReferenceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slots for one and two requests, four for the rest; blocks shorter than their slots; AR in between."""
    speculator = runner(llm).speculator
    addresses: set[tuple[int, ...]] = set()
    metadata = speculator.buffers.metadata

    def watching(*args: Any, **kwargs: Any) -> Any:
        found = metadata(*args, **kwargs)
        tensors = (found.block_table, found.prefix_lens, found.block_starts, found.mask_kinds)
        addresses.add(tuple(tensor.data_ptr() for tensor in tensors))
        return found

    monkeypatch.setattr(speculator.buffers, "metadata", watching)
    block = speculator.block_length
    graphs = Recorded(
        {slots: functools.partial(speculator._draft, 0, slots, block, False, graph=True) for slots in (3, 4)}
    )
    monkeypatch.setattr(speculator, "_graphs", {False: graphs})
    prompts = random_prompts([7, 40, 12, 3], VOCAB, seed=4)
    each: list[dict[str, Any]] = [{}, {"block_length": 3}, {"mode": "ar"}, {"block_length": 6}]
    expected = [ar_generate(model, ids, 11).ids[len(ids) :] for ids in prompts]
    assert generate(llm, prompts, each, max_tokens=11) == expected
    assert generate(llm, prompts[:1], max_tokens=11) == expected[:1]
    assert set(graphs.replayed) == {3}
    assert generate(llm, prompts, max_tokens=11) == expected
    assert set(graphs.replayed) == {3, 4}
    assert len(addresses) == 1


WAITING = ("item", "cpu", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero")


def test_a_step_reads_nothing_back(llm: Any, model: ReferenceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither drafting nor verifying calls, from this extension's modules, what would wait for a GPU.

    The operators are left out: a CPU has other ones than a GPU, and they have tests of their own.
    """
    calls: list[str] = []

    def counted(name: str) -> Any:
        original = getattr(torch.Tensor, name)

        @functools.wraps(original)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_code
            if "/vllm_nld/" in caller.co_filename and "/vllm_nld/ops/" not in caller.co_filename:
                calls.append(f"{name} in {caller.co_qualname}")
            return original(self, *args, **kwargs)

        return call

    for name in WAITING:
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    prompts = random_prompts([7, 20], VOCAB, seed=4)
    found = generate(llm, prompts, max_tokens=8, temperature=0.8, seed=3)
    assert [len(text) for text in found] == [8, 8]
    generate(llm, prompts, max_tokens=8)
    generate(llm, prompts, [{"branches": 2}, {"branches": "all"}], max_tokens=8)
    assert not calls
    assert torch.ones(1).item() == 1.0 and not calls  # calls from other modules are not counted
    draft_block(model, KVCache(), 7, 3)  # the reference does read back: the watch would notice
    assert any("tolist" in call for call in calls)
