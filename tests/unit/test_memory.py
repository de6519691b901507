"""Rows over the vocabulary are large: a draft processes them in chunks and keeps few, and vLLM's profiling covers
them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.config import CUDAGraphMode
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_nld.draft_pass import forward as draft_pass
from vllm_nld.draft_pass import memory
from vllm_nld.draft_pass.block import Block, CommitRule
from vllm_nld.draft_pass.forward import DraftPass
from vllm_nld.draft_pass.memory import ProfiledDraft, drafts_allowed, drafts_per_request, profiling_drafts, rows_in
from vllm_nld.draft_pass.token_choice import DraftChoice, TokenChoice
from vllm_nld.ops.sizes import round_size
from vllm_nld.worker import hooks
from vllm_nld.worker.gpu import NLDGPUWorker
from vllm_nld.worker.hooks import IntroducesProposer

VOCAB, MASK, TOKENS = 24, 5, 64


class Model(nn.Module):
    """Predicts token (position + 7) % VOCAB, and records its calls."""

    draft_lora = None
    lm_head = SimpleNamespace(tp_size=1)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.dtypes: set[tuple[torch.dtype, torch.dtype]] = set()
        self.rows: list[int] = []

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Return one-hot "hidden states"."""
        self.dtypes.add((input_ids.dtype, positions.dtype))
        return nn.functional.one_hot((positions + 7) % VOCAB, VOCAB).to(torch.bfloat16)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Return logits that make their token nearly certain."""
        self.rows.append(len(hidden))
        return hidden * 20

    def shard_logits(self, hidden: Tensor) -> tuple[Tensor, None]:
        """As ``compute_logits``, because there is one rank."""
        return self.compute_logits(hidden), None


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """The forward contexts that draft passes set: attention metadata and options."""
    seen: list[tuple[Any, dict[str, Any]]] = []

    class Context:
        def __init__(self, metadata: Any, config: Any, **options: Any) -> None:
            seen.append((metadata, options))

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(draft_pass, "set_forward_context", Context)
    return seen


def make(model: Model, cache: int = 1) -> DraftPass:
    layer = SimpleNamespace(kv_cache=torch.zeros(cache))
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(mask_token_id=MASK),
            max_model_len=1000,
            get_vocab_size=lambda: VOCAB,
            enable_prompt_embeds=False,
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=TOKENS),
        compilation_config=SimpleNamespace(static_forward_context={"layer": layer}),
    )
    return DraftPass(config, model)


def chosen_blocks(lengths: list[int], rule: CommitRule) -> list[Block]:
    """Blocks whose tokens are chosen from logits; their first token is given."""
    return [Block(0, [1] + [MASK] * (length - 1), rule, choice=TokenChoice(vocab_size=VOCAB)) for length in lengths]


def test_draft_forward_has_the_inputs_of_a_vllm_forward(contexts: list[Any]) -> None:
    """vLLM compiles for int32 ids and int64 positions and drops the guards; and it may have captured graphs."""
    model = Model()
    make(model).run([Block(0, [1, MASK, MASK])])
    assert model.dtypes == {(torch.int32, torch.int64)}
    assert all(options["cudagraph_runtime_mode"] == CUDAGraphMode.NONE for _, options in contexts)


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 7, 1000])
def test_logits_come_in_chunks_of_blocks(
    contexts: list[Any], monkeypatch: pytest.MonkeyPatch, rows: int, compact: bool
) -> None:
    monkeypatch.setattr(draft_pass, "CHUNK_BYTES", rows * VOCAB * 4)
    model = Model()
    filler = make(model)
    filler.compact = compact
    blocks = chosen_blocks([3, 4, 2, 8], CommitRule("left_to_right", {"tokens_per_step": 2}))
    blocks[1].stop_ids = frozenset({9})  # decided at once, with masks after it
    filler.run(blocks)
    for block in blocks:
        decided = block.decided(MASK)
        assert decided == [1, *((position + 7) % VOCAB for position in range(1, len(decided)))]
    assert blocks[1].decided(MASK) == [1, 8, 9]
    assert max(model.rows) <= round_size(max(rows, 7)), "no block has more than 7 masks"
    assert filler.forwards == 4


@pytest.mark.parametrize("choose", [True, False])
def test_rows_of_logits_do_not_exceed_tokens_of_a_step(contexts: list[Any], choose: bool) -> None:
    """The LoRA data of rows is made for this many rows."""
    filler, seen = make(Model()), list[tuple[int, int]]()
    filler.max_tokens = 44
    filler.activate_tasks = lambda blocks, tokens, logits: seen.append((tokens, logits))
    blocks = chosen_blocks([22, 22], CommitRule("confidence_threshold", {"threshold": 0.0}))
    for block in blocks:
        block.choice = block.choice if choose else None
    filler.run(blocks)
    assert seen == [(44, 44)]


def test_chunk_holds_the_positions_of_the_learned_sampler(contexts: list[Any]) -> None:
    """It gets whole blocks, of which a few positions may be masked."""
    filler = make(Model())
    rule = CommitRule("learned", {"threshold": 0.9})
    few = [Block(0, [1] * 7 + [MASK], rule) for _ in range(4)]
    assert [len(chunk) for chunk in filler._chunks(few)] == [4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draft_pass, "CHUNK_BYTES", 16 * VOCAB * 4)
        assert [len(chunk) for chunk in filler._chunks(few)] == [2, 2]


def test_drafting_is_profiled_before_there_is_a_cache(contexts: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_pass, "DRAWN_BYTES", 20 * VOCAB * 4)
    drawn: list[Tensor] = []
    original = ProfiledDraft.choose

    def choose(self: ProfiledDraft, logits: Tensor, *rest: Any) -> Tensor:
        tokens = original(self, logits, *rest)
        assert self.probs is not None
        drawn.append(self.probs)
        return tokens

    monkeypatch.setattr(ProfiledDraft, "choose", choose)
    model = Model()
    filler = make(model, cache=0)
    filler.profile(requests=100, block_length=8)
    assert [metadata for metadata, _ in contexts] == [None, None]
    assert model.rows[0] == TOKENS, "a verification of 8 blocks"
    assert [tuple(probs.shape) for probs in drawn] == [(7, VOCAB)] * 2, "20 rows hold two blocks' drafts"
    assert (filler.forwards, filler.block_forwards) == (0, 0)


def test_profiled_draft_takes_the_memory_of_a_drawn_one() -> None:
    """Its float32 probabilities are kept, and so is the class that selects them."""
    draft = ProfiledDraft()
    assert isinstance(draft, DraftChoice)
    draft.choose(torch.randn(3, VOCAB), [1, 2, 3], [])
    assert draft.probs is not None
    assert (draft.probs.dtype, draft.probs.shape, draft.peak.shape) == (torch.float32, (3, VOCAB), (3,))


class Runner:
    """The profiling part of vLLM's runner, which verifies one draft for each of ``requests``."""

    def __init__(self, requests: int, vocab_size: int = VOCAB) -> None:
        self.requests, self.vocab_size = requests, vocab_size
        self.rejection_sampler = RejectionSampler(Sampler())
        self.verified: list[tuple[int, int, int]] = []
        self.rejection_sampler.forward = lambda metadata, probs, logits, _: self.verified.append(
            (len(metadata.num_draft_tokens), 0 if probs is None else len(probs), len(logits))
        )
        self.profiled = 0
        self.drafter = SimpleNamespace(profile=self._count)

    def _count(self) -> None:
        self.profiled += 1

    def _sync_device(self) -> None:
        pass

    def profile_run(self) -> None:
        """Verify one draft per request."""
        drafts = SpecDecodeMetadata.make_dummy([[0]] * self.requests, torch.device("cpu"))
        self.rejection_sampler(drafts, None, torch.zeros(2 * self.requests, self.vocab_size), None)


@pytest.mark.parametrize(("requests", "each"), [(2, 7), (5, 4), (20, 1), (30, 1)])
def test_profiling_verifies_as_many_drafts_as_serving_may(
    monkeypatch: pytest.MonkeyPatch, requests: int, each: int
) -> None:
    monkeypatch.setattr(memory, "DRAWN_BYTES", 20 * VOCAB * 4)
    runner = Runner(requests)
    with profiling_drafts(runner, drafts=7):
        runner.profile_run()
    assert runner.verified == [(requests, requests * each, requests * (each + 1))]
    assert runner.profiled == 1
    runner.profile_run()
    assert runner.verified[1:] == [(requests, 0, 2 * requests)]
    assert runner.profiled == 1


def test_gpu_worker_profiles_with_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(self: Any) -> int:
        self.model_runner.profile_run()
        return 7

    monkeypatch.setattr(NLDGPUWorker.__mro__[2], "determine_available_memory", measure)
    worker = object.__new__(NLDGPUWorker)
    worker.model_runner = Runner(2)
    worker.vllm_config = SimpleNamespace(speculative_config=SimpleNamespace(num_speculative_tokens=3))
    assert worker.determine_available_memory() == 7
    assert worker.model_runner.verified == [(2, 6, 8)]
    assert worker.model_runner.profiled == 1


def test_operators_are_warmed_up_before_vllm_ends_its_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """At its end it starts to watch for compiled kernels. Forwards are timed when everything is compiled."""
    order: list[str] = []

    class Warm:
        def compile_or_warm_up_model(self) -> str:
            order.append("vLLM")
            return "times"

    class Worker(IntroducesProposer, Warm):
        model_runner = SimpleNamespace(
            drafter=SimpleNamespace(draft_pass=None, block_length=4, measure_costs=lambda: order.append("costs"))
        )

    monkeypatch.setattr(hooks, "warm_up", lambda *_: order.append("operators"))
    assert Worker().compile_or_warm_up_model() == "times"
    assert order == ["operators", "vLLM", "costs"]


def test_memory_limits_drafts_only_if_probabilities_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    by_argmax = True
    monkeypatch.setattr(memory.sampling, "decides_by_argmax", lambda *_: by_argmax)
    runner = SimpleNamespace(rejection_sampler=None, input_batch=SimpleNamespace(sampling_metadata=None))
    assert drafts_allowed(runner, 4000, 131072) >= 31
    by_argmax = False
    assert drafts_allowed(runner, 32, 131072) >= 31
    assert drafts_allowed(runner, 64, 131072) == 16
    assert drafts_allowed(runner, 4000, 131072) == 0


def test_limits_in_rows_of_131072_tokens() -> None:
    assert rows_in(memory.CHUNK_BYTES, 131072) == 512
    assert rows_in(memory.DRAWN_BYTES, 131072) == 1024
    assert drafts_per_request(1, 131072) == 1024
