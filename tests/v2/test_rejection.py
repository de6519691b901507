"""Drafts verified by vLLM's rejection sampler, and exactly, leave the verifier's distribution as it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.chi_square import chi_square_p_value
from tests.support.interpreted import INTERPRETING
from tests.support.second_runner import complete_interpreter

if INTERPRETING:
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

    from vllm_nld.speculator import kernels
    from vllm_nld.speculator.buffers import OWN_STREAM
    from vllm_nld.speculator.verify import NLDRejectionSampler
    from vllm_nld.vllm_glue import second_runner

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="its tensors are on the CPU")

VOCAB, REQUESTS, TEMPERATURE, POSITION = 8, 160, 1.3, 20


@pytest.fixture(scope="module")
def sampled() -> Any:
    """One draft of each of many requests, verified; every other one by rejection.

    After the draft there is a place for a second one, which holds a token that is no draft.
    """
    complete_interpreter()
    generator = torch.Generator().manual_seed(4)
    target, draft = torch.randn(2, VOCAB, generator=generator) * 1.5
    requests = torch.arange(REQUESTS)
    temperature = torch.full((REQUESTS,), TEMPERATURE)
    seeds = torch.randint(-(2**62), 2**62, (REQUESTS,), generator=generator)
    kinds = torch.where(requests % 2 == 0, kernels.REJECTION, kernels.EXACT).int()
    # As the speculator draws: by a stream of its own where the distribution counts, else with the verifier's noise.
    places = torch.where(kinds == kernels.REJECTION, POSITION + OWN_STREAM, POSITION)
    kept = draft.expand(REQUESTS, 2, VOCAB).contiguous()
    drafts = second_runner.draw(kept[:, 0], requests, temperature, seeds, places, tempered=False, fp64=False)
    filling = torch.full_like(drafts, int(target.argmax()))  # what would be accepted most often
    given = {
        "target_logits": (target / TEMPERATURE).expand(3 * REQUESTS, VOCAB).contiguous(),
        "draft_logits": kept,
        "draft_sampled": torch.stack((torch.zeros_like(drafts), drafts, filling), 1).flatten().int(),
        "cu_num_logits": (torch.arange(REQUESTS + 1) * 3).int(),
        "pos": torch.tensor([POSITION, POSITION + 1, POSITION + 2]).repeat(REQUESTS),
        "idx_mapping": requests,
        "expanded_idx_mapping": requests.repeat_interleave(3),
        "expanded_local_pos": torch.tensor([0, 1, 2], dtype=torch.int32).repeat(REQUESTS),
        "temperature": temperature,
        "seed": seeds,
        "num_speculative_steps": 2,
    }
    table = SimpleNamespace(
        rejections=lambda _: True,
        exactly=lambda _: True,
        random=np.ones(REQUESTS, dtype=bool),
        on_device=(None, kinds, None),
    )
    verifier = object.__new__(NLDRejectionSampler)
    verifier.sampler = SimpleNamespace(use_fp64_gumbel=False)
    verifier._indices = np.arange(REQUESTS)
    verifier.speculator = SimpleNamespace(
        table=table,
        buffers=SimpleNamespace(valid=torch.ones(REQUESTS, dtype=torch.int32)),
        last_drafts=torch.zeros(REQUESTS, 2, dtype=torch.int64),
    )
    tokens, counts = verifier.verify(lambda known: rejection_sample(*known.values()), given)
    return target, draft, kinds, drafts, tokens, counts


@pytest.mark.parametrize("kind", ["REJECTION", "EXACT"])
def test_tokens_have_the_verifier_s_distribution(sampled: Any, kind: str) -> None:
    target, _, kinds, drafts, tokens, counts = sampled
    own = kinds == getattr(kernels, kind)
    expected = (target / TEMPERATURE).double().softmax(-1)
    first = torch.bincount(tokens[own, 0], minlength=VOCAB)
    assert chi_square_p_value(first, expected * own.sum()) > 1e-3
    taken = own & (tokens[:, 0] == drafts) & (counts == 2)
    second = torch.bincount(tokens[taken, 1], minlength=VOCAB)
    assert chi_square_p_value(second, expected * taken.sum()) > 1e-3
    assert own.sum() / 5 < taken.sum() < own.sum()
    assert counts[own].max() == 2  # filling is never accepted


def test_rejection_accepts_as_many_as_it_can(sampled: Any) -> None:
    """The share is that of both distributions' overlap; exact verification accepts no more."""
    target, draft, kinds, _, _, counts = sampled
    p, q = ((logits / TEMPERATURE).softmax(-1) for logits in (target, draft))
    overlap = float(torch.minimum(p, q).sum())
    rejection = float((counts[kinds == kernels.REJECTION] == 2).float().mean())
    exact = float((counts[kinds == kernels.EXACT] == 2).float().mean())
    assert abs(rejection - overlap) < 4 * (overlap * (1 - overlap) / (REQUESTS / 2)) ** 0.5
    assert overlap / (2 - overlap) - 0.15 < exact < overlap + 0.15


def test_the_best_token_is_what_ar_takes() -> None:
    """Steps of greedy requests skip vLLM's kernel, which AR steps run. Ties fall to the lowest token in both."""
    complete_interpreter()
    logits = torch.randint(0, 40, (3, 2500), generator=torch.Generator().manual_seed(1)).float()  # several of its tiles
    ones, zeros = torch.arange(3), torch.zeros(3)
    taken = second_runner.draw(logits, ones, zeros, ones, ones, tempered=True, fp64=False)
    assert (logits == logits.max(1, keepdim=True).values).sum(1).min() > 10
    assert taken.equal(logits.argmax(-1))
