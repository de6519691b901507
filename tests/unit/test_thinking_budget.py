"""vLLM forces every end of thinking at its place and in its own request, whatever the drafts: as it does without."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

from tests.unit.test_greedy_verify import CPU, greedy, kernels, spec_metadata  # noqa: F401
from vllm_nld.proposer.thinking import ThinkingBudget
from vllm_nld.vllm_glue.rejection_sampler import guide_verification
from vllm_nld.vllm_glue.thinking_budget import repair_thinking_budget

VOCAB, TOKENS, MOST_DRAFTS = 40, 60, 3
START, END = 1, 2
TABLE = torch.randn(97, VOCAB, generator=torch.Generator().manual_seed(0))
TABLE[::9, START] = 9.0  # thinking starts again and again, and now and then ends by itself
TABLE[::31, END] = 8.0


def next_logits(text: list[int]) -> Tensor:
    """A model whose next token depends on the last one and on the position."""
    return TABLE[(31 * text[-1] + 7 * len(text)) % len(TABLE)].clone()


@dataclass
class Batch:
    """Requests that think, and their samplers; ``end`` is what vLLM forces at the end of a budget."""

    budgets: list[int | None]
    end: list[int]
    drafts: bool
    texts: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        tokens = {"reasoning_start_token_ids": [START], "reasoning_end_token_ids": self.end}
        count = len(self.budgets)
        self.holder = ThinkingBudgetStateHolder(
            SimpleNamespace(**tokens), count, MOST_DRAFTS if self.drafts else 0, CPU, False
        )
        self.texts = [[] for _ in range(count)]
        params = [SamplingParams(thinking_token_budget=budget) for budget in self.budgets]
        self.prompts = [[5 + row, START] for row in range(count)]
        added = [(row, params[row], self.prompts[row], self.texts[row]) for row in range(count)]
        self.holder.sync_batch(BatchUpdate(batch_size=count, removed=[], added=added, moved=[]))
        self.limits = [ThinkingBudget(budget or 0, [START], self.end) for budget in self.budgets]
        self.sampler = RejectionSampler(Sampler())
        self.runner = SimpleNamespace(
            rejection_sampler=self.sampler,
            requests={str(row): SimpleNamespace(sampling_params=own) for row, own in enumerate(params)},
            input_batch=SimpleNamespace(req_ids=[str(row) for row in range(count)]),
        )
        if self.drafts:
            repair_thinking_budget(self.runner)
            guide_verification(self.sampler, lambda metadata: None, lambda row: False)

    def step(self, drafts: list[list[int]], plainly: bool) -> None:
        """Decide tokens; ``plainly``: as vLLM before 0.32 does without drafts."""
        logits = torch.stack(
            [
                next_logits([*prompt, *text, *own[:place]])
                for prompt, text, own in zip(self.prompts, self.texts, drafts, strict=True)
                for place in range(len(own) + 1)
            ]
        )
        settings = {"spec_token_ids": drafts, "thinking_budget_state_holder": self.holder}
        sampling = greedy(len(drafts), output_token_ids=self.texts, **settings)
        if not self.drafts or (plainly and not any(drafts)):
            found = self.sampler.sampler(logits=logits, sampling_metadata=sampling).sampled_token_ids.tolist()
        else:
            output = self.sampler(spec_metadata(drafts), None, logits, sampling)
            found = RejectionSampler.parse_output(output.sampled_token_ids, VOCAB)[0]
        for text, tokens in zip(self.texts, found, strict=True):
            text += tokens

    def run(self, generator: random.Random, perfect: list[list[int]] | None = None) -> list[list[int]]:
        """Generate; as in the proposer, no draft opens a section or reaches the end of a budget. Some are wrong."""
        while min(map(len, self.texts)) < TOKENS:
            drafts: list[list[int]] = [[] for _ in self.budgets]
            if perfect is not None and generator.random() < 0.7:
                for row, text in enumerate(self.texts):
                    most = generator.randint(0, MOST_DRAFTS)
                    left = self.limits[row].left(self.prompts[row], text)
                    own = perfect[row][len(text) :][: most if left is None else min(most, max(0, left - 1))]
                    own = [generator.randrange(3, VOCAB) if generator.random() < 0.2 else token for token in own]
                    drafts[row] = own[: own.index(START)] if START in own else own
            self.step(drafts, plainly=generator.random() < 0.5)
        return [text[:TOKENS] for text in self.texts]


@pytest.mark.parametrize("end", [[END], [7, END], [7, END, 8]])
def test_drafts_change_no_end_of_thinking(end: list[int]) -> None:
    """Several sections a request, whose ends are forced, drafted, or come by themselves; AR steps in between."""
    for seed in range(6):
        generator = random.Random(seed)
        budgets: list[int | None] = [generator.randint(0, 9) for _ in range(4)]
        expected = Batch(budgets, end, drafts=False).run(generator)
        assert all(text.count(START) > 1 and text.count(END) > 2 for text in expected)
        assert Batch(budgets, end, drafts=True).run(generator) == expected
        assert Batch(budgets, end, drafts=True).run(generator, expected) == expected


def test_a_swap_gives_no_budget_to_another_request() -> None:
    """Before 0.28, vLLM leaves a copy in the row that a budget comes from."""
    batch = Batch([4, None], [END], drafts=True)
    batch.holder.sync_batch(BatchUpdate(2, removed=[], added=[], moved=[(0, 1, MoveDirectionality.SWAP)]))
    batch.holder._state[0] = dict(batch.holder._state[1])
    for rows in (batch.texts, batch.prompts, batch.runner.input_batch.req_ids):
        rows.reverse()
    without, limited = batch.run(random.Random(0))
    alone = Batch([4, None], [END], drafts=False).run(random.Random(0))
    assert [limited, without] == alone


def test_repairing_twice_is_repairing_once() -> None:
    batch = Batch([4], [END], drafts=True)
    once = batch.sampler.sampler.forward
    repair_thinking_budget(batch.runner)
    assert batch.sampler.sampler.forward is once
