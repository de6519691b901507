"""Finding the user's mistake in what vLLM and pydantic wrap around it."""

from __future__ import annotations

import sys

import pytest
from pydantic import ValidationError
from pydantic.dataclasses import dataclass

from vllm_nld.errors import NLDError, find, show_plainly

MISTAKE = NLDError("block too long")


@dataclass
class Config:
    size: int = 0

    def __post_init__(self) -> None:
        if self.size:
            raise MISTAKE


def validation_error() -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        Config(size=1)
    return caught.value


def caused(outer: BaseException, inner: BaseException) -> BaseException:
    outer.__cause__ = inner
    return outer


def test_find() -> None:
    assert find(MISTAKE) is MISTAKE
    assert find(caused(RuntimeError("engine"), caused(TypeError(), MISTAKE))) is MISTAKE
    assert find(validation_error()) is MISTAKE
    assert find(caused(RuntimeError("engine"), validation_error())) is MISTAKE
    during = RuntimeError()
    during.__context__ = MISTAKE
    assert find(during) is MISTAKE


def test_find_nothing() -> None:
    assert find(None) is None
    assert find(ValueError("block too long")) is None
    with pytest.raises(ValidationError) as caught:
        Config(size="many")  # type: ignore[arg-type]
    assert find(caught.value) is None


def test_find_ends_on_a_loop() -> None:
    first, second = ValueError(), ValueError()
    first.__cause__, second.__cause__ = second, first
    assert find(first) is None


def test_hook(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    passed_on: list[BaseException] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: passed_on.append(error))
    show_plainly()
    hook = sys.excepthook
    show_plainly()
    assert sys.excepthook is hook, "installing twice must not stack hooks"
    error = caused(RuntimeError("engine"), validation_error())
    hook(type(error), error, None)
    assert capsys.readouterr() == ("", "vllm-nld: error: block too long\n")
    assert passed_on == []
    other = KeyError("x")
    hook(KeyError, other, None)
    assert passed_on == [other]
    assert capsys.readouterr() == ("", "")
