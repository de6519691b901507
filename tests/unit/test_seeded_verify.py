"""Seeded requests are verified by their seeds' draws: every text equals that of plain steps, for any drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler

from tests.unit.test_greedy_verify import greedy, kernels, spec_metadata  # noqa: F401
from vllm_nld.ops.noise import Noise
from vllm_nld.vllm_glue import cpu_repairs
from vllm_nld.vllm_glue.rejection_sampler import accept_diffusion, draw_seeded, guide_verification

VOCAB, REQUESTS, TOKENS = 30, 4, 30
UNSEEDED = 2
TABLE = 2 * torch.randn(97, VOCAB, generator=torch.Generator().manual_seed(0))


def next_logits(text: Sequence[int]) -> Tensor:
    """A model whose next token depends on the last one and on the position."""
    return TABLE[(31 * text[-1] + 7 * len(text)) % len(TABLE)].clone()


@dataclass
class Batch:
    """Four requests, the third without a seed, and their samplers."""

    settings: dict[str, Any]
    mode: str = "raw_logprobs"
    texts: list[list[int]] = field(default_factory=lambda: [[row] * (3 + row) for row in range(REQUESTS)])
    drafts: list[list[int]] = field(default_factory=lambda: [[] for _ in range(REQUESTS)])
    logprobs: list[list[float]] = field(default_factory=lambda: [[] for _ in range(REQUESTS)])

    def __post_init__(self) -> None:
        cpu_repairs.repair_cpu_temperature()
        self.sampler = RejectionSampler(Sampler(self.mode))  # type: ignore[arg-type]
        draw = self.sampler.sampler.topk_topp_sampler
        self.noise = {row: Noise(row % 2, draw) for row in range(REQUESTS) if row != UNSEEDED}  # two share a seed
        self.generators = {row: torch.Generator() for row in self.noise}
        for _ in range(2):  # as when vLLM lowers the length limit
            accept_diffusion(self.sampler, lambda row: False)
            draw_seeded(self.sampler, self.noise_at, self.seed_draws)
            guide_verification(self.sampler, lambda metadata: None, lambda row: False)

    def noise_at(self, row: int) -> tuple[Noise, int] | None:
        return (self.noise[row], len(self.texts[row])) if row in self.noise else None

    def seed_draws(self) -> None:
        for row, generator in self.generators.items():
            generator.manual_seed(self.noise[row].key(len(self.texts[row]) + len(self.drafts[row])))

    def step(self, drafts: list[list[int]]) -> int:
        """Decide tokens; return how many drafts of seeded requests were accepted."""
        self.drafts = drafts
        logits = torch.stack(
            [
                next_logits([*text, *own[:place]])
                for text, own in zip(self.texts, drafts, strict=True)
                for place in range(len(own) + 1)
            ]
        )
        whole = {"temperature": 0.9, "top_k": VOCAB, "top_p": 1.0} | self.settings
        sampling = greedy(
            REQUESTS,
            all_greedy=False,
            all_random=True,
            temperature=torch.full((REQUESTS,), whole["temperature"]),
            top_k=torch.full((REQUESTS,), whole["top_k"], dtype=torch.int32),
            top_p=torch.full((REQUESTS,), whole["top_p"]),
            generators=self.generators,
            max_num_logprobs=1,
        )
        output = self.sampler(spec_metadata(drafts), None, logits, sampling)
        decided, found = RejectionSampler.parse_output(
            output.sampled_token_ids, VOCAB, logprobs_tensors=output.logprobs_tensors
        )
        values = iter(found.logprobs[:, 0].tolist())
        accepted = 0
        for row, tokens in enumerate(decided):
            self.texts[row] += tokens
            self.logprobs[row] += [next(values) for _ in tokens]
            accepted += len(tokens) - 1 if row in self.noise else 0
        return accepted

    def run(self, drafting: torch.Generator | None, perfect: list[list[int]] | None = None) -> int:
        """Generate; ``drafting`` gives the number of drafts, and which of them differ from the ``perfect`` ones."""
        accepted = 0
        while min(map(len, self.texts)) < TOKENS:
            drafts: list[list[int]] = [[] for _ in range(REQUESTS)]
            if drafting is not None and perfect is not None:
                for row, text in enumerate(self.texts):
                    count = int(torch.randint(0, 6, (), generator=drafting))
                    own = (perfect[row][len(text) :] + [0] * 6)[:count]
                    wrong = torch.rand(count, generator=drafting) < 0.3
                    other = torch.randint(0, VOCAB, (count,), generator=drafting)
                    drafts[row] = torch.where(wrong, other, torch.tensor(own, dtype=torch.int64)).tolist()
            accepted += self.step(drafts)
        return accepted


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logits", "processed_logprobs"])
@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.7, "temperature": 1.3}, {"top_k": 9, "top_p": 0.9}])
def test_drafts_change_no_seeded_text(settings: dict[str, Any], mode: str) -> None:
    plain = Batch(settings, mode)
    plain.run(None)
    texts = [text[:TOKENS] for text in plain.texts]
    for seed in range(2):
        drafted = Batch(settings, mode)
        assert drafted.run(torch.Generator().manual_seed(seed), plain.texts) > 30
        for row in drafted.noise:
            assert drafted.texts[row][:TOKENS] == texts[row]
            both = zip(drafted.logprobs[row], plain.logprobs[row], strict=False)
            assert all(abs(one - other) < 1e-5 for one, other in both)


def test_seeds_and_positions_draw_differently() -> None:
    plain = Batch({"temperature": 50.0})  # nearly uniform
    plain.run(None)
    tails = [tuple(text[10:TOKENS]) for text in plain.texts]
    assert tails[1] == tails[3], "the same seed at the same positions"
    assert len(set(tails)) == REQUESTS - 1
    assert all(len(set(tail)) > 10 for tail in tails)
