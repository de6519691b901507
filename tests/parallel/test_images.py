"""Images on two tensor-parallel ranks, which share tower, projector and text model: the reference's text."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.engines import engine
from tests.support.images import Ask, Oracle, complete, needs_images, picture, texts
from tests.support.models import save_vlm, small_vlm_config

START = 18
ASKS = [
    Ask([7, START, 8, 9], [picture(1)]),
    Ask([START, 8, START, 11], [picture(2), picture(3, 300, 170)]),
    Ask([7, 8, 9, 10]),
]


@pytest.mark.usefixtures("two_ranks_once")
def test_every_mode_equals_the_reference(tmp_path: Path) -> None:
    needs_images()
    folder = save_vlm(small_vlm_config(), tmp_path, seed=1)
    oracle = Oracle(folder)
    expected = [oracle.answer(ask, "ar", 16) for ask in ASKS]
    settings = {"max_num_seqs": 12, "max_model_len": 200, "limit_mm_per_prompt": {"image": 2}}
    modes = ["ar", "self_speculation", "auto", "diffusion"]
    diffused = [oracle.answer(ask, "diffusion", 16) for ask in ASKS]
    with engine(folder, spec=True, tensor_parallel_size=2, **settings) as llm:
        each = [{"mode": mode} for mode in modes for _ in ASKS]
        assert texts(complete(llm, ASKS * len(modes), each, 16)) == expected * 3 + diffused
