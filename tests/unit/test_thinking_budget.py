"""A text with a thinking budget is AR's text, whatever was drafted and whichever steps decided it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

from tests.unit.test_greedy_verify import CPU, greedy, kernels, spec_metadata  # noqa: F401
from tests.unit.test_thinking import counted_from_scratch
from vllm_nld.proposer.thinking import ThinkingBudget
from vllm_nld.vllm_glue.rejection_sampler import guide_verification
from vllm_nld.vllm_glue.thinking_budget import force_ends_by_position

VOCAB, TOKENS, MOST_DRAFTS = 40, 60, 4
START, END = 1, 2
PROMPTS = [[5, START], [6], [START, 3, 3, START, 3], [START, 4, END, 7]]


@dataclass
class Model:
    """Its next token depends on the last one and on the position; it starts and ends thinking again and again."""

    seed: int

    def __post_init__(self) -> None:
        self.table = torch.randn(97, VOCAB, generator=torch.Generator().manual_seed(self.seed))
        self.table[:: 5 + self.seed % 7, START] += 4.0
        self.table[:: 4 + self.seed % 9, END] += 4.0

    def logits(self, text: list[int]) -> Tensor:
        return self.table[(31 * text[-1] + 7 * len(text)) % len(self.table)].clone()

    def text(self, prompt: list[int], budget: int, end: list[int]) -> list[int]:
        """AR, by a count of the whole text for every token."""
        text, pending = list[int](), list[int]()
        while len(text) < TOKENS:
            if not pending and counted_from_scratch(budget, [START], end, prompt, text) == 0:
                pending = list(end)
            text.append(pending.pop(0) if pending else int(self.logits([*prompt, *text]).argmax()))
        return text


@dataclass
class Batch:
    """Requests that think, and their samplers; ``end`` is what is forced at the end of a budget."""

    model: Model
    budgets: list[int]
    end: list[int]
    texts: list[list[int]] = field(default_factory=lambda: [[] for _ in PROMPTS])

    def __post_init__(self) -> None:
        tokens = {"reasoning_start_token_ids": [START], "reasoning_end_token_ids": self.end}
        self.holder = ThinkingBudgetStateHolder(SimpleNamespace(**tokens), len(PROMPTS), MOST_DRAFTS, CPU, False)
        self.thinking = [ThinkingBudget(budget, [START], self.end) for budget in self.budgets]
        self.sampler = RejectionSampler(Sampler())
        for _ in range(2):  # as when vLLM lowers the length limit
            force_ends_by_position(
                self.sampler.sampler,
                lambda row, drafts: self.thinking[row].forced(PROMPTS[row], self.texts[row], drafts),
            )
        guide_verification(self.sampler, lambda metadata: None, lambda row: False)
        for row in range(len(PROMPTS)):
            self.add(row)

    def add(self, row: int) -> None:
        """Take a request into vLLM's batch, also anew after a preemption."""
        params = SamplingParams(thinking_token_budget=self.budgets[row])
        added = [(row, params, PROMPTS[row], self.texts[row])]
        self.holder.sync_batch(BatchUpdate(batch_size=len(PROMPTS), removed=[row], added=[], moved=[]))
        self.holder.sync_batch(BatchUpdate(batch_size=len(PROMPTS), removed=[], added=added, moved=[]))

    def decide(self, drafts: list[list[int]], plainly: bool) -> list[list[int]]:
        """Return what a step decides; ``plainly``: as vLLM before 0.32 does without drafts."""
        logits = torch.stack(
            [
                self.model.logits([*prompt, *text, *own[:place]])
                for prompt, text, own in zip(PROMPTS, self.texts, drafts, strict=True)
                for place in range(len(own) + 1)
            ]
        )
        settings = {"spec_token_ids": drafts, "thinking_budget_state_holder": self.holder}
        sampling = greedy(len(drafts), output_token_ids=self.texts, **settings)
        if plainly and not any(drafts):
            return self.sampler.sampler(logits=logits, sampling_metadata=sampling).sampled_token_ids.tolist()
        output = self.sampler(spec_metadata(drafts), None, logits, sampling)
        return RejectionSampler.parse_output(output.sampled_token_ids, VOCAB)[0]

    def run(self, generator: random.Random, perfect: list[list[int]]) -> list[list[int]]:
        """Generate. Some drafts are wrong, some steps have none, and what some steps decide is discarded."""
        while min(map(len, self.texts)) < TOKENS:
            drafts: list[list[int]] = [[] for _ in PROMPTS]
            for row, text in enumerate(self.texts if generator.random() < 0.7 else ()):
                own = perfect[row][len(text) :][: generator.randint(0, MOST_DRAFTS)]
                drafts[row] = [generator.randrange(VOCAB) if generator.random() < 0.1 else token for token in own]
            decided = self.decide(drafts, plainly=generator.random() < 0.5)
            for row, text in enumerate(self.texts):
                if generator.random() < 0.1:
                    self.add(row)
                elif generator.random() < 0.9:
                    text += decided[row]
        return [text[:TOKENS] for text in self.texts]


@pytest.mark.parametrize("end", [[END], [7, END], [7, END, 8]])
def test_no_step_changes_an_end_of_thinking(end: list[int]) -> None:
    """Drafts may open sections, end them, and cross the end of a budget; requests are preempted and added anew."""
    ends = forced = 0
    for seed in range(10):
        generator = random.Random(seed)
        model, budgets = Model(seed), [generator.randint(0, 9) for _ in PROMPTS]
        expected = [model.text(prompt, budget, end) for prompt, budget in zip(PROMPTS, budgets, strict=True)]
        assert Batch(model, budgets, end).run(generator, expected) == expected, seed
        free = [model.text(prompt, 10**6, end) for prompt in PROMPTS]
        ends += sum(text.count(END) for text in expected)
        forced += sum(text != other for text, other in zip(expected, free, strict=True))
    assert ends > 150
    assert forced > 20


def test_without_budgets_nothing_is_forced() -> None:
    sampler, logits = Sampler(), torch.zeros(1, VOCAB)
    force_ends_by_position(sampler, lambda row, drafts: ())
    once = sampler.forward
    force_ends_by_position(sampler, lambda row, drafts: [END])
    assert sampler.forward is once
    holder = SimpleNamespace(has_tracked_requests=lambda: True)
    output = sampler(logits, greedy(1, spec_token_ids=[[]], thinking_budget_state_holder=holder))
    assert output.sampled_token_ids.tolist() == [[0]]
