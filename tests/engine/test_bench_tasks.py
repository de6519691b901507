"""``vllm-nld bench tasks`` on the embedded model, at its smallest. ``ngram`` is left out: no engine starts after it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.engines import prepare_process
from vllm_nld.cli import bench_tasks
from vllm_nld.cli.bench_tasks import AR, Options, run

WAYS = ("self-speculation", "self-speculation, lookup", "diffusion 0.5", "auto")


def test_every_mode_by_category(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_process()
    written: list[int] = []
    rows_of = bench_tasks.rows_of
    monkeypatch.setattr(bench_tasks, "rows_of", lambda some, ar: written.append(len(some)) or rows_of(some, ar))
    file = tmp_path / "prompts.jsonl"
    options = Options(file=file, prompts=1, max_tokens=8, ways=WAYS, thresholds=(0.5,), concurrency=(1, 2))
    lines = [{"category": "qa", "turns": ["What is 3?"]}, {"category": "python", "prompt": "def f(x):", "answer": 1}]
    file.write_text("\n".join(map(json.dumps, lines)))
    run(options, tmp_path / "out.json", tmp_path / "out.png", as_json=True)
    report = json.loads(capfd.readouterr().out)
    assert json.loads((tmp_path / "out.json").read_text()) == report
    assert written == list(range(1, 1 + 3 * len((AR, *WAYS))))  # after each result
    assert (tmp_path / "out.png").stat().st_size > 10_000
    rows = {(row["way"], row["category"], row["concurrency"]): row for row in report["results"]}
    assert len(rows) == 4 * len((AR, *WAYS))
    for (way, _, _), row in rows.items():
        assert row["tokens"] == 8 * row["requests"]
        if "diffusion" not in way:
            assert row["same_text"] == row["requests"]
    drafting = rows["self-speculation", "all", 1]
    assert drafting["tpf"] > 1
    assert drafting["acceptance_length"] == pytest.approx(1 + sum(drafting["accepted_by_position"]), abs=0.01)
    assert rows["diffusion 0.5", "all", 1]["acceptance_length"] is None
    assert rows[AR, "all", 1]["acceptance_length"] is None
    assert rows[AR, "all", 1]["tpf"] == round(16 / 14, 3)
    assert rows[AR, "all", 1]["speed_up"] == 1
    assert rows[AR, "python", 1]["checked"] == 1
