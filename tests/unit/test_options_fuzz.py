"""Any value of any option, of ours or vLLM's, is refused by name or handled by all code that uses it."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

from vllm_nld.draft_pass.block import Block
from vllm_nld.draft_pass.forward import DraftPass
from vllm_nld.draft_pass.learned_sampler import LearnedSampler, LearnedSamplerConfig
from vllm_nld.errors import NLDError
from vllm_nld.model.best_tokens import Best
from vllm_nld.options import MODES_OF_KEY, NLDOptions
from vllm_nld.proposer.blocks import Sizes, diffusion_block, draft_block
from vllm_nld.proposer.requests import Requests
from vllm_nld.serving.admission import EngineTraits, request_options

VOCAB, MASK, LONGEST = 20, 5, 16
current_platform.import_kernels()  # a worker's first deed; its sampler on CPUs needs them
EXAMPLES = int(os.environ.get("NLD_FUZZ_EXAMPLES", "150"))
"""More by hand: NLD_FUZZ_EXAMPLES=5000 takes some minutes."""
INTEGERS = [-(2**63), -1, 0, 1, 2, 3, 15, 16, 17, 1000, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**400]
FLOATS = [math.inf, -math.inf, math.nan, 1e308, -1e308, 3.5e38, 1e-40, 5e-324, -0.0, 0.0, 1e-6, 0.01, 0.3, 1.0, 2.0]
OTHERS = [None, True, False, "", "auto", "1", "\ud800", [], {}, [1], {"a": 1}]
ANYTHING = st.sampled_from(INTEGERS) | st.sampled_from(FLOATS) | st.sampled_from(OTHERS) | st.floats() | st.integers()
NAMES = {
    "mode": st.sampled_from(["self_speculation", "diffusion"]),
    "sampler": st.sampled_from(["confidence_threshold", "top_k", "left_to_right", "entropy_budget", "learned"]),
}
IDS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4)
BEARABLE = st.sampled_from([-2.0, -5e-324, 0.0, 1e-40, 1.3, 2.0])
VLLMS = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 5e-324, 1e-40, 1e-6, 0.01, 0.7, 2.0])},
    optional={
        "top_p": st.sampled_from([5e-324, 1e-40, 1e-8, 0.5, 1 - 1e-16, 1.0]),
        "top_k": st.sampled_from([-1, *INTEGERS[2:]]),
        "seed": st.sampled_from(INTEGERS),
        "min_tokens": st.sampled_from([0, 1, 3, 30, 2**31, 2**63 - 1]),
        "max_tokens": st.sampled_from([3, 30, 2**31, 2**63 - 1]),
        "presence_penalty": BEARABLE,
        "frequency_penalty": BEARABLE,
        "repetition_penalty": st.sampled_from([5e-324, 1e-300, 1e-40, 0.5, 1.0, 3.5e38, 1e308]),
        "stop_token_ids": IDS,
        "allowed_token_ids": IDS,
    },
)
"""Options that vLLM itself admits, with extreme values."""


class RandomModelPass(DraftPass):
    """The real loop over a block, on random logits."""

    def __init__(self, learned_sampler: LearnedSampler, mask_token_id: int) -> None:
        self.learned_sampler, self.mask_token_id = learned_sampler, mask_token_id
        self.compact, self.max_tokens, self.vocab_size = True, 1 << 10, VOCAB

    def _hidden(self, blocks: Any) -> Tensor:
        return torch.empty(0)

    def _logits(self, hidden: Tensor, group: Any, blocks: Any) -> Tensor:
        masked = sum(block.tokens.count(self.mask_token_id) for block in blocks)
        logits = torch.randn(masked, VOCAB) * 8
        logits[:, 7] = 0.0
        logits[:, self.mask_token_id] = -torch.inf
        return logits

    def _best(self, hidden: Tensor, group: Any, blocks: Any) -> Best:
        probability, tokens = self._logits(hidden, group, blocks).softmax(-1).max(-1)
        return Best(tokens, probability)


@pytest.fixture(scope="module")
def sampler() -> LearnedSampler:
    logging.getLogger("vllm.sampling_params").setLevel(logging.ERROR)  # it warns of every low temperature
    torch.manual_seed(0)
    config = LearnedSamplerConfig(vocab_size=VOCAB, d_model=16, layers=1, heads=2, feed_forward=16)
    return LearnedSampler(config).eval()


def options_of(draw: Any, engine: EngineTraits, params: Any) -> NLDOptions:
    """Draw a request's options, in one of their forms; any refusal must be an NLDError."""
    mode = draw(NAMES["mode"])
    fitting = [key for key, modes in MODES_OF_KEY.items() if mode in modes]
    keys = draw(st.sets(st.sampled_from(fitting), max_size=3))
    nld = {"mode": mode} | {key: draw(NAMES.get(key, ANYTHING) | ANYTHING) for key in sorted(keys)}
    spelling = draw(st.sampled_from(["object", "flat", "json"]))
    if spelling == "flat":
        params.extra_args = {f"nld.{key}": value for key, value in nld.items()}
    else:
        params.extra_args = {"nld": json.dumps(nld) if spelling == "json" else nld}
    try:
        return request_options(params, engine)
    except NLDError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 3000
        str(error).encode()
        assume(False)
        raise


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_admitted_options_can_be_used(sampler: LearnedSampler, data: Any) -> None:
    mask = data.draw(st.sampled_from([MASK, 0]))
    try:
        params = SamplingParams(**data.draw(VLLMS))
    except (VLLMValidationError, ValueError):  # min_tokens above max_tokens
        assume(False)
    params.stop_token_ids = [token for token in params.stop_token_ids if token != mask]
    engine = EngineTraits(NLDOptions(), LONGEST, Path("learned_sampler"))
    options = options_of(data.draw, engine, params)
    cached = SimpleNamespace(
        sampling_params=params, prompt_token_ids=[1, 2, 3, 2], output_token_ids=[8, 9], num_prompt_tokens=4
    )
    hf_config = SimpleNamespace(mask_token_id=mask, never_emitted=(mask,), image_token_ids=())
    runner = SimpleNamespace(
        requests={"request": cached},
        model_config=SimpleNamespace(hf_config=hf_config),
        sampler=SimpleNamespace(topk_topp_sampler=TopKTopPSampler()),
    )
    state, sizes = Requests(runner, engine, None).state("request"), Sizes(LONGEST, VOCAB, mask, 56)
    block: Block | None
    if state.is_diffusion:
        block = diffusion_block(state, sizes, 9, 5)
    else:
        length = state.longest_draft_block(options.block_length or LONGEST)
        block = draft_block(state, sizes, 9, 5, length) if length > 1 else None
    if block is None:
        return
    assert block.length <= LONGEST

    def stuck(forwards: int) -> bool:
        assert forwards <= LONGEST, "a forward commits at least one position"
        return False

    RandomModelPass(sampler, mask).run([block], stuck)
    assert all(0 <= token < VOCAB for token in block.decided(mask))
    allowed = params.allowed_token_ids
    if allowed is not None and state.is_diffusion and set(allowed) - {mask} - params.all_stop_token_ids:
        assert set(block.decided(mask)[int(options.seed_first) :]) <= set(allowed)
    assert all(0 <= confidence <= 1.0001 for confidence in block.confidence)
    if block.choice is not None and getattr(block.choice, "probs", None) is not None:
        torch.testing.assert_close(block.choice.probs.sum(-1), torch.ones(block.length - 1), rtol=0, atol=1e-4)
