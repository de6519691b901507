"""Self-speculation with branches in a real engine: AR's text, and the reference's forwards and hits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import counters, engine, generate, random_prompts
from tests.support.models import random_model, save, small_config
from vllm_nld.branches.places import every_place, likeliest_places
from vllm_nld.reference import ar_generate, branch_spec_generate
from vllm_nld.reference.adapter import DraftAdapter

WAYS: dict[str, tuple[dict[str, Any], Any, bool]] = {
    "three": ({"branches": 3}, likeliest_places(3, 8), True),
    "short": ({"branches": 6, "branch_length": 4}, likeliest_places(6, 4), True),
    "all": ({"branches": "all"}, every_place(8), False),
}


def tally(llm: Any) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = llm.collective_rpc("nld_tally")[0]
    return found


def test_every_forward_equals_the_reference(tmp_path: Path) -> None:
    """Same text, same NFE, same hits and the same query tokens, request by request."""
    model = random_model(small_config(eos_token_id=11, block_size=8), seed=3)
    folder = save(model, tmp_path)
    hits = 0
    with engine(folder, spec=True, max_num_seqs=1) as llm:
        for name, (options, choose, look_past) in WAYS.items():
            for prompt in random_prompts([1, 40, 90], 24, seed=7):
                before, counted = counters(llm), tally(llm)["branches"]
                (tokens,) = generate(llm, [prompt], [options], max_tokens=50)
                spent = {key: value - before[key] for key, value in counters(llm).items()}
                branches = {kind: n - counted.get(kind, 0) for kind, n in tally(llm)["branches"].items()}
                expected = branch_spec_generate(model, prompt, choose, 50, look_past=look_past)
                assert tokens == expected.ids[len(prompt) :], name
                assert tokens == ar_generate(model, prompt, 50).ids[len(prompt) :]
                assert spent["target_forwards"] + spent["draft_forwards"] == expected.nfe, name
                used = expected.hits[:-1]  # the last cycle's branch has nothing to draft for
                assert branches.get("mask", 0) == used.count("mask"), name
                assert branches.get("guess", 0) == used.count("guess"), name
                hits += len(used) - used.count("none")
    assert hits > 10
