"""Images on the second runner: every mode answers as the dense reference does, and drafts as it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.images import Ask, Oracle, complete, needs_images, picture, texts
from tests.support.models import save_vlm, small_vlm_config
from tests.support.second_runner import second_engine, watch_drafts
from tests.v2.test_exact_text import reference_drafts

START = 18
ASKS = [
    Ask([7, START, 8, 9], [picture(1, 60, 60)]),
    Ask([7, START, 8, 9], [picture(2, 60, 60)]),
    Ask([11, 8, 9, 10]),
    Ask([START, 8, START, 11], [picture(2, 28, 28), picture(3, 100, 60)]),
]


def test_every_mode_equals_the_reference(tmp_path: Path) -> None:
    """Prompts run in chunks of 16 tokens at most, between which images are divided."""
    needs_images()
    folder = save_vlm(small_vlm_config(), tmp_path, seed=1)
    oracle = Oracle(folder)
    expected = [oracle.answer(ask, "ar", 9) for ask in ASKS]
    settings: dict[str, Any] = {"limit_mm_per_prompt": {"image": 2}, "max_num_batched_tokens": 16}
    with second_engine(folder, enable_prefix_caching=True, block_size=32, **settings) as llm:
        with watch_drafts(llm) as seen:
            drafting = [{"mode": "self_speculation"}] * 4
            assert texts(complete(llm, ASKS, drafting, 9)) == expected
        text = ASKS[2].ids + expected[2]
        own = {place: ids for (start, place), ids in seen.items() if start == (11, 8, 9) and place <= len(text)}
        assert own
        assert all(ids == reference_drafts(oracle.model, text[:place], 8) for place, ids in own.items())
        mixed = [{"mode": "diffusion"}, {"mode": "auto"}, {"mode": "ar"}, {"mode": "diffusion"}]
        diffused = {row: oracle.answer(ASKS[row], "diffusion", 9) for row in (0, 3)}
        assert texts(complete(llm, ASKS, mixed, 9)) == [diffused.get(row, own) for row, own in enumerate(expected)]
