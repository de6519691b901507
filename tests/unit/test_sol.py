"""The speed-of-light analysis: its runs lead to the target, and are the longest that do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import vllm_nld.reference
from tests.support import commands
from tests.support.models import random_model, small_config
from vllm_nld.reference import KVCache, ReferenceModel
from vllm_nld.reference.speed_of_light import Safety, SpeedOfLight, _Simulator, analyse

MASK = 5


def simulator(model: ReferenceModel, prompt: list[int], safety: Safety) -> tuple[_Simulator, int]:
    cache = KVCache()
    with torch.inference_mode():
        logits = model.causal(torch.tensor([prompt]), cache)[0, -1]
    return _Simulator(model, cache, 5000, safety), int(logits.argmax())


@torch.inference_mode()
def serial(model: ReferenceModel, cache: KVCache, state: list[int]) -> list[int]:
    """Serial denoising, implemented independently."""
    state = list(state)
    while MASK in state:
        logits = model.bidirectional(torch.tensor([state]), cache)[0]
        confidence, tokens = logits.softmax(-1).max(-1)
        row = max((i for i, token in enumerate(state) if token == MASK), key=lambda i: float(confidence[i]))
        state[row] = int(tokens[row])
    return state


@torch.inference_mode()
def accepting(model: ReferenceModel, cache: KVCache, state: list[int], target: list[int]) -> list[int]:
    """Greedy acceptance, written out again; it stops where no prediction is right."""
    state = list(state)
    while MASK in state:
        tokens = model.bidirectional(torch.tensor([state]), cache)[0].argmax(-1).tolist()
        right = [i for i, token in enumerate(state) if token == MASK and tokens[i] == target[i]]
        if not right:
            break
        for row in right:
            state[row] = target[row]
    return state


@pytest.mark.parametrize("safety", [Safety.SERIAL, Safety.ACCEPTANCE])
@pytest.mark.parametrize("seed", range(4))
def test_the_runs_are_safe_and_the_longest(seed: int, safety: Safety) -> None:
    """Against brute force: every longer run by confidence misses the target."""
    model = random_model(small_config(vocab_size=12), seed)
    sim, seed_token = simulator(model, [7, 8, 9, 10 + seed % 2], safety)
    with torch.inference_mode():
        block = sim.analyse(seed_token, 6)
    state = [seed_token] + [MASK] * 5
    assert block.target == serial(model, sim.cache, state)
    assert sorted(p for commit in block.commits for p in commit) == [1, 2, 3, 4, 5]
    for commit in block.commits:
        with torch.inference_mode():
            confidence, tokens = model.bidirectional(torch.tensor([state]), sim.cache)[0].softmax(-1).max(-1)
        right = [i for i in range(6) if state[i] == MASK and int(tokens[i]) == block.target[i]]
        right.sort(key=lambda i: -float(confidence[i]))
        assert commit == right[: len(commit)]
        for count in range(len(commit), len(right) + 1):
            probe = [block.target[i] if i in right[:count] else token for i, token in enumerate(state)]
            if safety is Safety.SERIAL:
                end = serial(model, sim.cache, probe)
            else:
                end = accepting(model, sim.cache, probe, block.target)
            # One position is committed without a check, since something must be.
            assert (end == block.target) == (count == len(commit)) or count == 1
        state = [block.target[i] if i in commit else token for i, token in enumerate(state)]


@pytest.mark.parametrize("seed", range(3, 7))
def test_greedy_acceptance_commits_all_that_is_right(seed: int) -> None:
    model = random_model(small_config(), seed)
    sim, seed_token = simulator(model, [7, 8, 9], Safety.GREEDY)
    with torch.inference_mode():
        block = sim.analyse(seed_token, 12)
    state, given = [seed_token] + [MASK] * 11, 0
    for commit in block.commits:
        with torch.inference_mode():
            tokens = model.bidirectional(torch.tensor([state]), sim.cache)[0].argmax(-1).tolist()
        right = {i for i in range(12) if state[i] == MASK and tokens[i] == block.target[i]}
        assert set(commit) == right or (not right and len(commit) == 1)
        given += not right
        state = [block.target[i] if i in commit else token for i, token in enumerate(state)]
    assert MASK not in state
    assert block.given == given > 0


def test_independent_positions_take_one_forward() -> None:
    model = random_model(small_config(), seed=1)
    with torch.no_grad():
        for layer in model.encoder.layers:  # only the token itself matters
            layer.self_attn.o_proj.weight.zero_()
    found = analyse(model, [7, 8, 9], 32, 8)
    assert (found.blocks, found.denoising, found.commits, found.serial) == (4, 4, 4, 28)
    assert found.tpf_denoising == 8.0
    assert found.tpf == 4.0


@pytest.mark.parametrize("length", [2, 8, 16])
def test_no_more_forwards_than_serial(length: int) -> None:
    found = analyse(random_model(small_config(), seed=3), [7, 8, 9], 40, length)
    assert found.tokens == 40
    assert found.blocks == found.commits == -(-40 // length)
    assert found.blocks - (40 % length == 1) <= found.denoising <= found.serial
    assert found.incomplete == 0


def test_spent_budget_is_reported() -> None:
    model = random_model(small_config(), seed=3)
    full, cut = (analyse(model, [7, 8, 9], 32, 16, budget, safety=Safety.SERIAL) for budget in (5000, 20))
    assert cut.incomplete == 2
    assert cut.simulated < full.simulated
    assert full.denoising <= cut.denoising <= cut.serial


def test_analyses_add_up() -> None:
    total = SpeedOfLight(tokens=3, denoising=1)
    total.add(SpeedOfLight(tokens=5, denoising=3, commits=2))
    assert (total.tokens, total.denoising, total.commits) == (8, 4, 2)


def invoke(*arguments: str) -> Any:
    return commands.invoke("sol", *arguments)


def test_sol_command_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    load = vllm_nld.reference.load_reference
    monkeypatch.setattr(vllm_nld.reference, "load_reference", lambda *args: loads.append(args) or load(*args))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def read(self):\n\nimport os\n")
    plot = tmp_path / "plot.png"
    result = invoke(
        "tiny", "--prompts", str(prompts), "--max-tokens", "8", "--block-length", "4", "--json", "--plot", str(plot)
    )
    assert result.exit_code == 0, result.output
    assert len(loads) == 1
    report = json.loads(result.stdout)
    assert report["prompts"] == 2
    assert [row["safe"] for row in report["speed_of_light"]] == ["serial", "acceptance", "greedy"]
    for row in report["speed_of_light"]:
        assert row["block_length"] == 4
        assert 4 / 4 <= row["tpf_denoising"] <= 4
    assert {mode["mode"] for mode in report["modes"]} >= {"AR", "self-speculation", "diffusion 0.9"}
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("absent.txt", None, ["--prompts", "absent.txt", "one prompt per line"]),
        ("empty.txt", "\n\n", ["--prompts", "empty"]),
        ("bad.jsonl", '{"text": "x"}\n', ["--prompts", '{"prompt": "..."}']),
    ],
)
def test_bad_prompts(tmp_path: Path, name: str, text: str | None, words: list[str]) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    result = invoke("tiny", "--prompts", str(tmp_path / name))
    assert result.exit_code == 1
    for word in words:
        assert word in result.stderr


def test_bad_arguments(tmp_path: Path) -> None:
    result = invoke(str(tmp_path))
    assert result.exit_code == 1
    assert "no config.json" in result.stderr
    assert invoke("tiny", "--block-length", "1").exit_code == 2
    assert invoke("tiny", "--budget", "0").exit_code == 2
