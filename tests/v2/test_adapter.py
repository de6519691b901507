"""The draft adapter on the second runner: in drafts only, and only of requests that want it; and what is counted."""

from __future__ import annotations

from pathlib import Path

from tests.support.adapters import random_adapter
from tests.support.engines import counters, generate, metric, random_prompts
from tests.support.models import random_model, save, small_config
from tests.support.second_runner import second_engine, watch_drafts
from tests.v2.test_exact_text import reference_drafts
from vllm_nld.checkpoints.draft_lora import FOLDER, TARGETS
from vllm_nld.reference import ar_generate


def test_drafts_run_with_it_and_texts_do_not(tmp_path: Path) -> None:
    config = small_config()
    model = random_model(config, 1)
    folder = save(model, tmp_path / "model")
    adapter = random_adapter(config, seed=2, targets=TARGETS, mask_row=True)
    adapter.write(folder / FOLDER, "somewhere")
    prompts = random_prompts([19, 8, 8], 24, seed=12)
    each = [{}, {"draft_adapter": False}, {"mode": "ar"}]
    expected = [ar_generate(model, ids, 9).ids[len(ids) :] for ids in prompts]
    with second_engine(folder) as llm:
        with watch_drafts(llm) as seen:
            assert generate(llm, prompts, each, max_tokens=9) == expected
        drafted = {}
        for prompt, text, draft_adapter in zip(prompts, expected, (adapter, None), strict=False):
            model.draft_adapter = draft_adapter
            own = {place: ids for (start, place), ids in seen.items() if start == tuple(prompt[:3])}
            whole = prompt + text
            drafted[draft_adapter is None] = own
            assert own
            assert all(
                ids == reference_drafts(model, whole[:place], 8) for place, ids in own.items() if place <= len(whole)
            )
        model.draft_adapter = None
        assert any(
            ids != reference_drafts(model, (prompts[0] + expected[0])[:place], 8)
            for place, ids in drafted[False].items()
            if place <= len(prompts[0]) + 9
        )
        tally, counted = llm.collective_rpc("nld_tally")[0], counters(llm)
        assert sum(tally["tokens"].values()) == 27
        assert tally["forwards"]["prefill"] == 3
        assert tally["forwards"]["ar"] == 8
        assert tally["blocks"]["self_speculation"] == counted["cycles"] == metric(llm, "vllm:spec_decode_num_drafts")
        accepted = tally["accepted"].get("self_speculation", 0)
        assert tally["tokens"]["self_speculation"] == 2 + counted["cycles"] + accepted
        assert counted["draft_forwards"] >= counted["cycles"] / 2
