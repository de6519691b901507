"""The files of examples/ray_batch.py: what is read, and that a folder always has every row once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from batch_output import BatchError, Output, Row, read_rows

SETTINGS = {"engine": {"model": "m"}, "sampling": {"max_tokens": 4}}


def result(row: Row) -> dict[str, Any]:
    return {"id": row.id, "prompt_digest": row.digest, "text": row.prompt.upper()}


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for part in sorted(folder.glob("part-*")) for line in part.read_text().splitlines()]


def test_rows_of_jsonl_and_parquet_are_numbered_or_named(tmp_path: Path) -> None:
    records = [{"prompt": "a", "name": "x"}, {"prompt": "b", "name": 7}]
    lines = tmp_path / "in.jsonl"
    lines.write_text(json.dumps(records[0]) + "\n\n" + json.dumps(records[1]) + "\n")
    assert list(read_rows([lines], "prompt", None)) == [Row("0", "a"), Row("1", "b")]
    assert list(read_rows([lines], "prompt", "name")) == [Row("x", "a"), Row("7", "b")]
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = tmp_path / "in.parquet"
    pyarrow.parquet.write_table(pa.table({"prompt": ["a", "b"], "name": ["x", "7"]}), table)
    assert list(read_rows([table], "prompt", "name")) == [Row("x", "a"), Row("7", "b")]
    assert [row.id for row in read_rows([lines, table], "prompt", None)] == ["0", "1", "2", "3"]
    with pytest.raises(BatchError, match="has no column 'text'; it has prompt, name"):
        list(read_rows([table], "text", None))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": 3, "name": 1}', "line 2: --prompt-column prompt must be a text, not 3"),
        ('{"prompt": "b"}', "line 2: --id-column name must be a text or a number, not None"),
        ('{"prompt": "b", "name": "x"}', "line 2: --id-column name must be unique, but 'x' occurs twice"),
        ('{"prompt": "b"', "line 2: not JSON"),
        ("[1]", "line 2: must be a JSON object"),
    ],
)
def test_unsuitable_rows_are_named(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a", "name": "x"}\n' + line + "\n")
    with pytest.raises(BatchError, match=words):
        list(read_rows([path], "prompt", "name"))


def test_later_run_continues_and_writes_no_row_twice(tmp_path: Path) -> None:
    rows = [Row(str(number), f"prompt {number}") for number in range(5)]
    output = Output(tmp_path, SETTINGS)
    assert output.add(map(result, rows[:2])) == 2
    assert output.add(map(result, rows[1:3])) == 1  # Ray ran a batch again
    assert output.add([]) == 0
    output._lock.close()  # as the system does when the driver is killed
    (tmp_path / "part-000009.jsonl.partial").write_text('{"id": "3"')  # killed while writing
    later = Output(tmp_path, SETTINGS)
    assert list(later.missing(rows)) == rows[3:]
    assert not list(tmp_path.glob("*.partial"))
    later.add(map(result, rows[3:]))
    assert not list(later.missing(rows))
    assert written(tmp_path) == [result(row) for row in rows]


def test_two_runs_cannot_write_at_once(tmp_path: Path) -> None:
    first = Output(tmp_path, SETTINGS)
    with pytest.raises(BatchError, match="another run is writing there"):
        Output(tmp_path, SETTINGS)
    assert first.done == {}


def test_results_of_other_settings_or_prompts_are_not_mixed(tmp_path: Path) -> None:
    output = Output(tmp_path, SETTINGS)
    output.add([result(Row("0", "a"))])
    with pytest.raises(BatchError, match="row '0' had another prompt"):
        list(output.missing([Row("0", "b")]))
    output._lock.close()
    with pytest.raises(BatchError, match=r'sampling={"max_tokens": 4}, and now sampling={"max_tokens": 5}'):
        Output(tmp_path, SETTINGS | {"sampling": {"max_tokens": 5}})
