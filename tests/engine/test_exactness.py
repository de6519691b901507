"""The promise: vLLM AR == reference AR == vLLM self-speculation == reference self-speculation, in float32."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import (
    accepted,
    counters,
    engine,
    generate,
    metric,
    random_prompts,
    runner,
    shun_ar,
    watch_blocks,
)
from tests.support.models import random_model, save, small_config, yarn
from vllm_nld.reference import ar_generate, linear_spec_generate
from vllm_nld.serving.ledger import Tally

# (heads, kv heads, head size): every GQA ratio and head size that matters, also head_dim != hidden / heads.
HEADS = [(4, 2, 32), (5, 5, 32), (8, 1, 64), (6, 2, 64), (4, 4, 128), (8, 2, 128), (3, 1, 32), (2, 2, 64)]
ROPES = [yarn(original=128), yarn(factor=16.0, original=32, theta=1e6), yarn(factor=0.25, original=2048, theta=1e9)]


def draw_case(seed: int) -> tuple[Any, list[list[int]], int]:
    """A random config, prompts of 1 token to several KV blocks, and a token budget."""
    rng = random.Random(seed)
    heads, kv_heads, head_dim = HEADS[seed % len(HEADS)]
    config = small_config(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=rng.choice([48, 64, 96]),
        num_hidden_layers=rng.choice([1, 2, 3]),
        block_size=[4, 8, 16, 32][(seed // 2) % 4],
        rope_parameters=ROPES[seed % len(ROPES)],
        max_position_embeddings=512,
        vocab_size=rng.choice([16, 24, 40]),
        eos_token_id=rng.choice([None, 11]),
    )
    lengths = [1] + [rng.choice([2, 17, 64, 130, 300]) for _ in range(rng.randint(0, 7))]
    return config, random_prompts(lengths, config.vocab_size, seed), rng.choice([5, 24, 40])


@pytest.mark.parametrize("seed", range(len(HEADS)))  # also every RoPE and block length
def test_tokens_equal_the_reference(seed: int, tmp_path: Path) -> None:
    config, prompts, budget = draw_case(seed)
    model = random_model(config, seed)
    folder = save(model, tmp_path)
    limits = {"max_model_len": 512, "block_size": 32}
    expected = [ar_generate(model, ids, budget).ids[len(ids) :] for ids in prompts]
    spec_reference = [linear_spec_generate(model, ids, budget) for ids in prompts]
    assert [g.ids[len(ids) :] for g, ids in zip(spec_reference, prompts, strict=True)] == expected
    with engine(folder, **limits) as llm:
        assert generate(llm, prompts, max_tokens=budget) == expected
    with engine(folder, spec=True, **limits) as llm:
        assert generate(llm, prompts, max_tokens=budget) == expected
        assert accepted(llm) == sum(n - 1 for g in spec_reference for n in g.accepted)
        assert config.mask_token_id not in {token for ids in expected for token in ids}


@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize("drafts", [True, 5])
def test_every_cycle_equals_the_reference(threshold: float, drafts: bool | int, tmp_path: Path) -> None:
    """Same drafts, same acceptance counts, same NFE, request by request."""
    model = random_model(small_config(eos_token_id=11, block_size=16), seed=3)
    folder = save(model, tmp_path)
    block_length = 16 if drafts is True else drafts + 1
    with engine(folder, spec=drafts, options={"draft_threshold": threshold}, max_num_seqs=1) as llm:
        blocks: list[list[int]] = []
        watch_blocks(llm, lambda block: blocks.append(list(block.tokens)))
        for prompt in random_prompts([1, 40, 90, 170], 24, seed=7):
            blocks.clear()
            before, accepted_before = counters(llm), accepted(llm)
            (tokens,) = generate(llm, [prompt], max_tokens=50)
            spent = {key: value - before[key] for key, value in counters(llm).items()}
            expected = linear_spec_generate(model, prompt, 50, block_length=block_length, threshold=threshold)
            assert tokens == expected.ids[len(prompt) :]
            assert blocks == [block for block in expected.drafts if len(block) > 1]
            assert spent["target_forwards"] + spent["draft_forwards"] == expected.nfe
            assert accepted(llm) - accepted_before == sum(n - 1 for n in expected.accepted)


def capture_logits(target: Any) -> list[Any]:
    """Keep a copy of every logits tensor the model computes from now on."""
    captured: list[Any] = []
    original = target.compute_logits

    def compute_logits(hidden: Any) -> Any:
        captured.append(original(hidden).clone())
        return captured[-1]

    target.compute_logits = compute_logits
    return captured


def test_logits_equal_the_reference(tmp_path: Path) -> None:
    """Within 1e-4 in float32 for each layer option, below and above the original context (128 and 32 tokens here)."""
    import torch

    for seed, (heads, kv_heads, head_dim) in enumerate([(4, 2, 32), (8, 2, 128), (5, 5, 64)]):
        config = small_config(
            num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
            rope_parameters=ROPES[seed], max_position_embeddings=512,
        )  # fmt: skip
        model = random_model(config, seed)
        (prompt,) = random_prompts([300], 24, seed)
        with engine(save(model, tmp_path / str(seed)), max_model_len=512) as llm:
            captured = capture_logits(runner(llm).model)
            generate(llm, [prompt], max_tokens=1, prompt_logprobs=1)
        expected = model.causal(torch.tensor([prompt]))[0]
        found = torch.cat([rows for rows in captured if len(rows) > 1]).cpu()
        assert len(found) == len(prompt) - 1
        allowed = torch.arange(config.vocab_size) != config.mask_token_id
        assert (found - expected[: len(found)])[:, allowed].abs().max() < 1e-4
        assert (found[:, ~allowed] == -torch.inf).all()


def test_long_prompt_uses_query_scale(tmp_path: Path) -> None:
    """Guards the exactness tests: without the llama-4 scale the reference itself would answer differently."""
    import torch

    with_scale = random_model(small_config(), seed=1)
    without = random_model(small_config(rope_parameters=yarn(beta=0.0)), seed=1)
    (prompt,) = random_prompts([200], 24)
    difference = (with_scale.causal(torch.tensor([prompt])) - without.causal(torch.tensor([prompt]))).nan_to_num()[0]
    assert difference[:64].abs().max() == 0
    assert difference[128:].abs().max() > 1e-2


@pytest.mark.parametrize("options", [{}, {"draft_threshold": 0.3}])
def test_looked_up_drafts_change_no_text_and_save_cycles(options: dict[str, Any], tmp_path: Path) -> None:
    model = random_model(small_config(eos_token_id=None, block_size=8), seed=3)
    prompts = [ids * 4 for ids in random_prompts([12, 20, 31], 24, seed=7)]
    expected = [ar_generate(model, ids, 60).ids[len(ids) :] for ids in prompts]
    cycles = {}
    with engine(save(model, tmp_path), spec=True) as llm:
        for length in (0, 3):
            before = counters(llm)["cycles"]
            nld = {"nld": options | {"prompt_lookup": length}}
            assert generate(llm, prompts, max_tokens=60, extra_args=nld) == expected
            cycles[length] = counters(llm)["cycles"] - before
    assert cycles[3] < cycles[0]


def test_looked_up_drafts_without_draft_pass_change_no_text(tmp_path: Path) -> None:
    """For any number of verified drafts, next to other modes, and with a full cache."""
    model = random_model(small_config(eos_token_id=None, block_size=8), seed=3)
    prompts = [ids * 4 for ids in random_prompts([12, 20, 31, 5, 9, 3], 24, seed=7)] * 2
    expected = [ar_generate(model, ids, 60).ids[len(ids) :] for ids in prompts]
    numbers = random.Random(5)
    folder, cache = save(model, tmp_path), {"kv_cache_memory_bytes": 1 << 19, "block_size": 32}
    with engine(folder, spec=True, max_model_len=256, max_num_seqs=8, **cache) as llm:
        shun_ar(llm, lambda count: numbers.randint(0, count))
        before = llm.collective_rpc("nld_tally")[0]
        alone = {"mode": "auto", "prompt_lookup": 2}
        modes = [{"mode": "self_speculation", "prompt_lookup": 3}, {"mode": "ar"}, alone, alone, alone, alone] * 2
        assert generate(llm, prompts, each=modes, max_tokens=60) == expected
        after = llm.collective_rpc("nld_tally")[0]
        preemptions = metric(llm, "vllm:num_preemptions")
    tally = Tally.between(before, after)
    assert preemptions > 0
    assert sum(count for choice, count in after["decisions"].items() if choice.startswith("prompt_lookup")) > 50
    assert tally.blocks["self_speculation"] - tally.forwards["draft"] > 50, "blocks that took no draft forward"
