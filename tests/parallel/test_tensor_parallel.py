"""Tensor parallelism gives the tokens of one rank, in float32 and in every mode, and ranks never disagree.

The engine is as in production: a core process and two workers under vLLM's multiprocessing executor. The last test
kills one of them.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.support.adapters import random_adapter
from tests.support.engines import engine
from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.checkpoints.draft_lora import FOLDER, TARGETS
from vllm_nld.checkpoints.held_out import held_out_prompts
from vllm_nld.reference import DraftAdapter, load_reference

TEXTS = [text for _, text in held_out_prompts(3, characters=150)]
SETTINGS: dict[str, Any] = {"skip_tokenizer_init": False, "max_model_len": 1024, "max_num_seqs": 8}

GREEDY: dict[str, Any] = {"temperature": 0}
SEEDED: dict[str, Any] = {"temperature": 1.0, "seed": 5, "top_p": 0.95}
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"mode": "ar"}, GREEDY),
    ({"mode": "ar"}, SEEDED),
    ({"mode": "self_speculation"}, GREEDY),
    ({"mode": "self_speculation"}, SEEDED),
    ({"mode": "self_speculation", "draft_threshold": 0.6, "block_length": 8}, GREEDY),
    ({"mode": "self_speculation", "branches": 3}, GREEDY),
    ({"mode": "self_speculation", "branches": "auto"}, SEEDED),
    ({"mode": "auto"}, GREEDY),
    ({"mode": "diffusion", "threshold": 0.7}, GREEDY),
    ({"mode": "diffusion", "threshold": 0.7}, SEEDED),
    ({"mode": "diffusion", "sampler": "entropy_budget"}, GREEDY),
    ({"mode": "diffusion", "sampler": "learned", "threshold": 0.8}, GREEDY),
    ({"mode": "diffusion", "seed_first": False}, GREEDY | {"repetition_penalty": 1.1}),
]


def complete(
    llm: Any, cases: list[tuple[dict[str, Any], dict[str, Any]]], tokens: int = 32, texts: list[str] = TEXTS
) -> list[list[int]]:
    """All texts for every case, all in one batch queue: modes mix, and diffusion blocks are parked."""
    from vllm import SamplingParams

    params = [SamplingParams(max_tokens=tokens, extra_args={"nld": nld}, **rest) for nld, rest in cases for _ in texts]
    outputs = llm.generate(texts * len(cases), params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def accepted_drafts(llm: Any) -> dict[bool, int]:
    """The numbers of drafts for the texts with and without the draft adapter."""
    found = {}
    for adapter in (True, False):
        before = llm.collective_rpc("nld_tally")[0]["accepted"].get("self_speculation", 0)
        complete(llm, [({"mode": "self_speculation", "draft_adapter": adapter}, GREEDY)], tokens=48)
        found[adapter] = llm.collective_rpc("nld_tally")[0]["accepted"].get("self_speculation", 0) - before
    return found


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The checkpoint's own adapter, and a little on all other projections and in the mask token's row."""
    folder = tmp_path_factory.mktemp("adapter")
    own = DraftAdapter.read(checkpoint_path("tiny") / FOLDER)
    model = load_reference(checkpoint_path("tiny"))
    rank = len(next(iter(own.a.values())))
    made = random_adapter(model.config, rank, targets=TARGETS, mask_row=True, size=0.01)
    made.scale = own.scale
    made.a |= own.a
    made.b |= own.b
    row = model.encoder.embed_tokens.weight[model.config.mask_token_id].detach()
    made.mask_row = row + 0.3 * row.std() * made.mask_row
    made.write(folder, "tiny")
    return {"draft_lora": str(folder)}


@pytest.fixture(scope="module")
def one_rank(adapted: dict[str, str]) -> tuple[list[list[int]], dict[bool, int]]:
    with engine(checkpoint_path("tiny"), spec=True, options=adapted, **SETTINGS) as alone:
        return complete(alone, CASES), accepted_drafts(alone)


@pytest.fixture(scope="module")
def expected(one_rank: Any) -> list[list[int]]:
    return list(one_rank[0])


@pytest.fixture(scope="module")
def llm(expected: Any, adapted: dict[str, str], two_ranks: None) -> Iterator[Any]:
    with engine(checkpoint_path("tiny"), spec=True, options=adapted, tensor_parallel_size=2, **SETTINGS) as made:
        yield made


def test_all_modes_in_one_batch(llm: Any, expected: list[list[int]]) -> None:
    assert complete(llm, CASES) == expected


def test_each_mode_by_itself(llm: Any, expected: list[list[int]]) -> None:
    for index, case in enumerate(CASES):
        first = index * len(TEXTS)
        assert complete(llm, [case], texts=TEXTS[:2]) == expected[first : first + 2], case


def test_draft_adapter_is_split_over_ranks(llm: Any, one_rank: Any) -> None:
    """On all projections. The text does not depend on drafts, but the number of accepted drafts does."""
    assert accepted_drafts(llm) == one_rank[1]
    assert one_rank[1][True] != one_rank[1][False]
    assert min(one_rank[1].values()) > 40


def skew(worker: Any) -> list[float]:
    """Make the second rank believe that drafting costs next to nothing, and that AR steps take forever."""
    costs = worker.model_runner.drafter.auto.costs
    if worker.rank == 1:
        costs.draft.seconds = costs.verify.seconds = lambda size: 1e-6
        costs.ar.seconds = lambda size: 10.0
    else:
        costs.draft.seconds = lambda size: 10.0
    return [costs.ar.seconds(1), costs.draft.seconds(16)]


def forwards(llm: Any) -> list[dict[str, int]]:
    return llm.collective_rpc("nld_counters", timeout=100)


def test_first_rank_decides_for_auto_mode(llm: Any, expected: list[list[int]]) -> None:
    """Ranks with different clocks run equal forwards: the first rank's choice, which is AR here."""
    first, second = llm.collective_rpc(skew)
    assert first[1] > 1 > second[1]
    before = forwards(llm)
    auto = CASES.index(({"mode": "auto"}, GREEDY)) * len(TEXTS)
    assert complete(llm, [({"mode": "auto"}, GREEDY)]) == expected[auto : auto + len(TEXTS)]
    after = forwards(llm)
    assert after[0] == after[1]
    assert after[0]["draft_forwards"] == before[0]["draft_forwards"]


def test_requests_fail_soon_after_a_rank_dies(llm: Any) -> None:
    """During generation: vLLM notices, reports it, and no process is left. The last test of this engine."""
    from vllm.v1.engine.exceptions import EngineDeadError

    workers = llm.collective_rpc(lambda worker: os.getpid())
    assert len({*workers, os.getpid()}) == 3
    killed: list[float] = []

    def kill() -> None:
        time.sleep(1.0)
        killed.append(time.monotonic())
        os.kill(workers[1], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(EngineDeadError, match="EngineCore"):
        while True:
            complete(llm, CASES, tokens=400)
    failed = time.monotonic()
    thread.join()
    print(f"failed {failed - killed[0]:.1f} s after the kill")
    assert 0 <= failed - killed[0] < 100
    for _ in range(300):
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in workers):
            break
        time.sleep(0.1)
    else:
        pytest.fail("a worker is left")
