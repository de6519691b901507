"""``vllm-nld bench branches`` on the embedded model, at its smallest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.cli import bench_branches
from vllm_nld.cli.bench_branches import AR, run


@pytest.fixture
def long_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``tiny`` says that it takes texts for which the bench's cache has no room, as ``smollm2`` does."""
    folder = tmp_path / "tiny"
    shutil.copytree(checkpoint_path("tiny"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1 << 17}))
    monkeypatch.setattr(bench_branches, "checkpoint_path", lambda name: folder)


@pytest.mark.usefixtures("long_context")
def test_every_way_gives_the_text_of_plain_vllm(capfd: pytest.CaptureFixture[str]) -> None:
    run("tiny", [8], prompts=1, max_tokens=16, dtype="float32", as_json=True)
    report = json.loads(capfd.readouterr().out)
    ways = {row["way"]: row for row in report["ways"]}
    assert all(row["same_text_as_ar"] == 1 for row in ways.values())
    assert ways[AR]["speed_up"] == ways[AR]["tpf"] == 1
    assert ways["linear, block 8"]["branch_tokens_per_forward"] == 0
    for name in ("8 branches, block 8", "quadratic, block 8"):
        assert ways[name]["tpf"] > ways["linear, block 8"]["tpf"]
        assert ways[name]["branch_tokens_per_forward"] > 0
    assert list(report["forward"]) == ["1", "8", "16", "32", "64", "128", "256"]
