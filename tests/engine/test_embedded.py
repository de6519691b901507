"""The embedded checkpoint: it loads without remote code, stops and thinks as it should, and accepts enough drafts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engines import accepted, engine, metric, prepare_process
from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.checkpoints.held_out import held_out_prompts
from vllm_nld.cli.demo import run as run_demo
from vllm_nld.reference import ar_generate, linear_spec_generate, load_reference
from vllm_nld.serving.ledger import Tally


def test_greedy_text_equals_reference_and_acceptance_pays() -> None:
    """Mean acceptance length on held-out modules, in vLLM, at float32."""
    from vllm import SamplingParams

    model = load_reference(checkpoint_path("tiny"))
    texts = [text for _, text in held_out_prompts(16)]
    with engine(checkpoint_path("tiny"), spec=True, skip_tokenizer_init=False) as llm:
        outputs = llm.generate(texts, SamplingParams(temperature=0, max_tokens=96), use_tqdm=False)
        drafts = metric(llm, "vllm:spec_decode_num_drafts")
        acceptance = 1 + accepted(llm) / drafts
    for output in outputs[:2]:
        ids = list(output.prompt_token_ids)
        expected = ar_generate(model, ids, 96)
        assert list(output.outputs[0].token_ids) == expected.ids[len(ids) :]
        assert linear_spec_generate(model, ids, 96).ids == expected.ids
    assert acceptance >= 3.0


def test_auto_mode_looks_up_repeated_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only by price: code repeats itself, and a verify pass is cheaper than a draft and a verify pass.

    Prices are given, because those that a busy machine shows may say anything.
    """
    from vllm import SamplingParams

    from vllm_nld.auto.costs import CostCurve
    from vllm_nld.auto.prices import ExpectedVsActual, Prices

    def seconds(self: CostCurve, size: int) -> float:
        return 1e-3 * (1 + 0.01 * size)

    monkeypatch.setattr(CostCurve, "seconds", seconds)
    monkeypatch.setattr(CostCurve, "ceiling", seconds)
    monkeypatch.setattr(Prices, "actual", lambda self, requests: ExpectedVsActual())
    monkeypatch.setattr(Prices, "was_interrupted", lambda *_: False)

    texts = [text for _, text in held_out_prompts(8)]

    def complete(mode: str) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=96, ignore_eos=True, extra_args={"nld": {"mode": mode}})
        return [list(output.outputs[0].token_ids) for output in llm.generate(texts, params, use_tqdm=False)]

    options = {"prompt_lookup": 3}
    with engine(checkpoint_path("tiny"), spec=True, options=options, skip_tokenizer_init=False) as llm:
        expected = complete("ar")
        before = llm.collective_rpc("nld_tally")[0]
        assert [complete("auto") for _ in range(2)] == [expected] * 2
        tally = Tally.between(before, llm.collective_rpc("nld_tally")[0])
    alone = tally.blocks["self_speculation"] - tally.forwards["draft"]
    assert alone > 20, "blocks that took no draft forward"
    assert tally.accepted["self_speculation"] > alone


def test_stop_strings_and_streamed_length() -> None:
    from vllm import SamplingParams

    texts = [text for _, text in held_out_prompts(4)]
    params = SamplingParams(temperature=0, max_tokens=80, stop=["\n"], include_stop_str_in_output=False)
    found = {}
    for spec in (False, True):
        with engine(checkpoint_path("tiny"), spec=spec, skip_tokenizer_init=False) as llm:
            outputs = [o.outputs[0] for o in llm.generate([t + "\n" for t in texts], params, use_tqdm=False)]
        found[spec] = [(o.text, list(o.token_ids), o.finish_reason) for o in outputs]
    assert found[True] == found[False]
    assert any(reason == "stop" for _, _, reason in found[True])


def test_thinking_may_end_just_before_its_budget() -> None:
    """Then no end is forced, though the drafts reached the budget's end.

    Only tokens about as likely as the end of thinking are allowed, so that this model emits it.
    """
    from vllm import SamplingParams
    from vllm.config.reasoning import ReasoningConfig

    think, end_think = 12, 13
    reasoning = ReasoningConfig(
        reasoning_parser="deepseek_r1", reasoning_start_str="<think>", reasoning_end_str="</think>"
    )
    with engine(
        checkpoint_path("tiny"), spec=True, max_num_seqs=8, skip_tokenizer_init=False, reasoning_config=reasoning
    ) as llm:
        ((_, text),) = held_out_prompts(1, characters=150)
        ids = [*llm.llm_engine.get_tokenizer().encode(text), think]
        logits = load_reference(checkpoint_path("tiny")).causal(torch.tensor([ids]))[0, -1]
        alike = (logits - logits[end_think]).abs().argsort()[:6].tolist()

        def texts(mode: str) -> list[list[int]]:
            shared: dict[str, Any] = {"max_tokens": 16, "thinking_token_budget": 6, "ignore_eos": True}
            shared |= {"allowed_token_ids": alike, "temperature": 2.0, "extra_args": {"nld": {"mode": mode}}}
            params = [SamplingParams(seed=seed, **shared) for seed in range(24)]
            outputs = llm.generate([{"prompt_token_ids": ids}] * len(params), params, use_tqdm=False)
            return [list(output.outputs[0].token_ids) for output in outputs]

        expected = texts("ar")
        ends = [ids[:6].index(end_think) for ids in expected if end_think in ids[:6]]
        # On an H100, which draws other numbers, four of the 24 did.
        assert len(ends) > 2, "hardly any thinking ended by itself: it would prove nothing"
        for mode in ("self_speculation", "auto"):
            assert texts(mode) == expected, mode


def test_remote_code_is_never_imported(tmp_path: Path) -> None:
    """A checkpoint whose remote code raises on import is served with trust_remote_code=False."""
    from vllm import SamplingParams

    folder = Path(shutil.copytree(checkpoint_path("tiny"), tmp_path / "remote"))
    for name in ("configuration_nemotron_labs_diffusion", "modeling_nemotron_labs_diffusion"):
        (folder / f"{name}.py").write_text("raise RuntimeError('remote code was imported')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_nemotron_labs_diffusion.NemotronLabsDiffusionConfig",
        "AutoModel": "modeling_nemotron_labs_diffusion.NemotronLabsDiffusionModel",
    }
    (folder / "config.json").write_text(json.dumps(config))
    with engine(folder, spec=True, skip_tokenizer_init=False, trust_remote_code=False) as llm:
        (output,) = llm.generate("import os\n", SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    assert len(output.outputs[0].token_ids) > 0


def test_demo_prints_the_verdict(capfd: pytest.CaptureFixture[str]) -> None:
    prepare_process()
    run_demo("tiny", 1, 16, "float32", as_json=False)
    assert "token for token identical" in capfd.readouterr().out


def test_demo_reports_as_json() -> None:
    """As a user starts it: nothing that a library prints gets between."""
    command = [sys.executable, "-m", "vllm_nld.cli", "demo", "--prompts", "2", "--max-tokens", "48", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["identical"] is True
    assert report["modes"]["ar"]["tpf"] == 1.0
    spec = report["modes"]["self_speculation"]
    assert {"tpf", "acceptance_length", "tokens_per_s"} <= spec.keys()
    # 2 prefills yield a token each, then a cycle of 2 forwards yields the acceptance length; a few steps are plain.
    cycles = (spec["forwards"] - 2) / 2
    assert spec["tokens"] - 2 == pytest.approx(cycles * spec["acceptance_length"], rel=0.1)
    assert 1 < spec["acceptance_length"] <= 16
