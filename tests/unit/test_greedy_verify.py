"""Greedy steps are verified in one pass over the logits, as by vLLM's rejection sampler, which runs all other steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_nld.errors import NLDError
from vllm_nld.vllm_glue.rejection_sampler import accept_diffusion, guide_verification

CPU = torch.device("cpu")
VOCAB = 40
CONFIG: Any = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=4))


@functools.cache
def register_kernels() -> None:
    """As in vLLM's worker; it looks at every module there is."""
    current_platform.import_kernels()
    if hasattr(current_platform, "register_triton_kernel_overrides"):
        current_platform.register_triton_kernel_overrides()


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    register_kernels()


def greedy(requests: int, **changes: Any) -> SamplingMetadata:
    """Sampling metadata of greedy requests without any options except the changes."""
    none = torch.zeros(requests)
    metadata = SamplingMetadata(
        temperature=None,
        all_greedy=True,
        all_random=False,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=none,
        presence_penalties=none,
        repetition_penalties=none + 1,
        output_token_ids=[[] for _ in range(requests)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors([MinTokensLogitsProcessor(CONFIG, CPU, False)]),
    )
    return replace(metadata, **changes)


def spec_metadata(drafts: Sequence[Sequence[int]], places: Tensor | None = None) -> SpecDecodeMetadata:
    """A step's metadata; ``places[i]`` is where the i-th row of logits in the usual order lies."""
    ends = list(accumulate(len(own) + 1 for own in drafts))
    places = torch.arange(ends[-1]) if places is None else places
    is_bonus = torch.zeros(ends[-1], dtype=torch.bool)
    is_bonus[torch.tensor(ends) - 1] = True
    return SpecDecodeMetadata(
        draft_token_ids=torch.tensor([token for own in drafts for token in own], dtype=torch.int32),
        num_draft_tokens=[len(own) for own in drafts],
        cu_num_draft_tokens=torch.tensor(list(accumulate(map(len, drafts))), dtype=torch.int32),
        cu_num_sampled_tokens=torch.tensor(ends, dtype=torch.int32),
        target_logits_indices=places[~is_bonus].int(),
        bonus_logits_indices=places[is_bonus].int(),
        logits_indices=torch.arange(ends[-1], dtype=torch.int32),
    )


@dataclass
class Guided:
    """A guided rejection sampler, and the number of calls of vLLM's own code."""

    sampler: Any
    own: int = 0


def guided(diffusion_rows: Sequence[int] = (), answer: Any = None) -> Guided:
    """A guided sampler; ``answer`` replaces the result of vLLM's own code."""
    made = Guided(RejectionSampler(Sampler()))
    original = made.sampler.forward

    @functools.wraps(original)
    def forward(*args: Any) -> Any:
        made.own += 1
        return original(*args) if answer is None else answer

    made.sampler.forward = forward
    accept_diffusion(made.sampler, diffusion_rows.__contains__)
    guide_verification(made.sampler, lambda metadata: None, diffusion_rows.__contains__)
    return made


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[list[int]], int, torch.dtype, bool]:
    """Draw drafts, a seed for logits, their dtype, and whether rows lie in another order; few tokens, so many agree."""
    token = st.integers(-1, 2)  # -1: vLLM's padding
    drafts = draw(st.lists(st.lists(token, max_size=6), min_size=1, max_size=5).filter(any))
    dtype = draw(st.sampled_from((torch.bfloat16, torch.float32, torch.float16)))
    return drafts, draw(st.integers(0, 99)), dtype, draw(st.booleans())


@given(step=steps(), nan=st.booleans())
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_greedy_steps_equal_the_rejection_sampler(step: Any, nan: bool) -> None:
    drafts, seed, dtype, shuffled = step
    rows = sum(len(own) + 1 for own in drafts)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-2, 2, (rows, VOCAB), generator=generator).to(dtype)  # full of ties
    logits[:, 3:] -= 3
    wanted = torch.tensor([token for own in drafts for token in (*own, 0)])
    agree = torch.rand(rows, generator=generator) < 0.7
    logits[agree, wanted[agree].clamp_min(0)] += 4
    if nan:
        logits[rows // 2, 30:32] = torch.nan
    places = torch.randperm(rows, generator=generator) if shuffled else torch.arange(rows)
    logits = torch.empty_like(logits).index_copy_(0, places, logits)
    metadata, sampling = spec_metadata(drafts, places), greedy(len(drafts))

    before = logits.clone()
    expected = RejectionSampler(Sampler())(metadata, None, logits.clone(), sampling)
    made = guided()
    found = made.sampler(metadata, None, logits, sampling)
    assert made.own == 0, "vLLM's own way was taken"
    assert isinstance(found, SamplerOutput)
    assert found.logprobs_tensors is None
    assert found.sampled_token_ids.dtype == expected.sampled_token_ids.dtype == torch.int32
    assert torch.equal(found.sampled_token_ids, expected.sampled_token_ids)
    assert logits.equal(before) or nan, "logits were written"


def test_warm_up_of_vllm_passes() -> None:
    """Its metadata names one row of logits for everything."""
    metadata = SpecDecodeMetadata.make_dummy([[0]] * 3, CPU)
    logits = torch.randn(6, VOCAB).bfloat16()
    expected = RejectionSampler(Sampler())(metadata, None, logits.clone(), greedy(3))
    made = guided()
    assert torch.equal(made.sampler(metadata, None, logits, greedy(3)).sampled_token_ids, expected.sampled_token_ids)
    assert made.own == 0


def min_tokens(requests: dict[int, Any]) -> Any:
    processor = MinTokensLogitsProcessor(CONFIG, CPU, False)
    processor.min_toks.update(requests)
    return processor


def logit_bias(biases: dict[int, dict[int, float]]) -> Any:
    processor = LogitBiasLogitsProcessor(CONFIG, CPU, False)
    processor.biases.update(biases)
    return processor


class NewProcessor(MinTokensLogitsProcessor):
    """An unknown processor, whose effect without requests is also unknown."""


def thinking(tracked: bool) -> Any:
    return SimpleNamespace(has_tracked_requests=lambda: tracked)


CHANGES: dict[str, Callable[[], dict[str, Any]]] = {
    "a sampled request": lambda: {"all_greedy": False, "temperature": torch.tensor([0.0, 1.0])},
    "log-probabilities": lambda: {"max_num_logprobs": 0},
    "log-probabilities of given tokens": lambda: {"logprob_token_ids": {1: [3]}},
    "penalties": lambda: {"no_penalties": False},
    "allowed tokens": lambda: {"allowed_token_ids_mask": torch.zeros(2, VOCAB, dtype=torch.bool)},
    "bad words": lambda: {"bad_words_token_ids": {0: [[1]]}},
    "min_tokens": lambda: {"logitsprocs": LogitsProcessors([min_tokens({0: (3, [], {1}, False)})])},
    "logit bias": lambda: {"logitsprocs": LogitsProcessors([logit_bias({0: {1: 1.0}})])},
    "unknown processor": lambda: {"logitsprocs": LogitsProcessors([NewProcessor(CONFIG, CPU, False)])},
    "thinking budget": lambda: {"thinking_budget_state_holder": thinking(True)},
}


@pytest.mark.parametrize("name", CHANGES)
def test_steps_that_may_change_logits_use_vllm(name: str) -> None:
    made = guided(answer="vLLM's own")
    found = made.sampler(
        spec_metadata([[1], [2, 3]]), None, torch.randn(5, VOCAB).bfloat16(), greedy(2, **CHANGES[name]())
    )
    assert (found, made.own) == ("vLLM's own", 1)


@pytest.mark.parametrize(
    "field",
    [
        "all_greedy", "no_penalties", "max_num_logprobs", "allowed_token_ids_mask", "bad_words_token_ids",
        "logprob_token_ids", "thinking_budget_state_holder", "logitsprocs", "non_argmax_invariant",
    ],
)  # fmt: skip
def test_fields_that_a_vllm_lacks_count_as_set(field: str) -> None:
    whole = greedy(2)
    values = {one.name: getattr(whole, one.name) for one in fields(whole) if one.name != field}
    if field == "non_argmax_invariant":
        values["logitsprocs"] = SimpleNamespace()
    made = guided(answer="vLLM's own")
    found = made.sampler(
        spec_metadata([[1], [2, 3]]), None, torch.randn(5, VOCAB).bfloat16(), SimpleNamespace(**values)
    )
    assert (found, made.own) == ("vLLM's own", 1)


@pytest.mark.parametrize("present", [True, False])
def test_synthetic_acceptance_uses_vllm(present: bool) -> None:
    made = guided(answer="vLLM's own")
    if present:
        made.sampler.synthetic_mode = True
    else:
        del made.sampler.synthetic_mode
    logits = torch.randn(5, VOCAB).bfloat16()
    assert made.sampler(spec_metadata([[1], [2, 3]]), None, logits, greedy(2)) == "vLLM's own"


def test_committed_blocks_use_vllm() -> None:
    """All of a diffusion row's drafts are accepted, for any logits; a row without drafts is like any other."""
    logits = torch.zeros(5, VOCAB)
    logits[:, 7] = 1.0
    made = guided(diffusion_rows=[1])
    found = made.sampler(spec_metadata([[1], [2, 3]]), None, logits, greedy(2))
    assert made.own == 1
    assert found.sampled_token_ids.tolist() == [[7, -1, -1], [2, 3, 7]]
    found = made.sampler(spec_metadata([[1, 7, 3], []]), None, logits, greedy(2))
    assert made.own == 1
    assert found.sampled_token_ids.tolist() == [[7, -1, -1, -1], [7, -1, -1, -1]]


IDLE: dict[str, Callable[[], dict[str, Any]]] = {
    "no processors": lambda: {"logitsprocs": LogitsProcessors()},
    "no logit bias": lambda: {"logitsprocs": LogitsProcessors([logit_bias({}), min_tokens({})])},
    "min_p": lambda: {"logitsprocs": LogitsProcessors([MinPLogitsProcessor(CONFIG, CPU, False)])},
    "no budget": lambda: {"thinking_budget_state_holder": thinking(False)},
}


@pytest.mark.parametrize("name", IDLE)
def test_idle_processors_change_nothing(name: str) -> None:
    logits = torch.randn(5, VOCAB).bfloat16()
    metadata, sampling = spec_metadata([[1], [2, 3]]), greedy(2, **IDLE[name]())
    expected = RejectionSampler(Sampler())(metadata, None, logits.clone(), sampling)
    made = guided()
    assert torch.equal(made.sampler(metadata, None, logits, sampling).sampled_token_ids, expected.sampled_token_ids)
    assert made.own == 0


def test_unknown_rejection_sampler_is_an_error() -> None:
    class Changed:
        def forward(self, metadata: Any, logits: Tensor, sampling_metadata: Any) -> Any: ...

    with pytest.raises(NLDError, match=r"RejectionSampler\.forward changed: its arguments are"):
        guide_verification(Changed(), lambda metadata: None, lambda row: False)


@pytest.mark.parametrize(
    "logits", [torch.randn(VOCAB, 4).t(), torch.randn(4, 2 * VOCAB)[:, ::2], torch.randn(4, VOCAB).double()]
)
def test_logits_that_the_operator_cannot_read_use_vllm(logits: Tensor) -> None:
    """The model's own logits always can be read, but the step must not fail if they cannot."""
    drafts = [[int(logits[0].argmax()), 3], []]
    expected = RejectionSampler(Sampler())(spec_metadata(drafts), None, logits.clone(), greedy(2))
    made = guided()
    found = made.sampler(spec_metadata(drafts), None, logits, greedy(2))
    assert made.own == 1
    assert torch.equal(found.sampled_token_ids, expected.sampled_token_ids)
