"""Finding the user's mistake in what vLLM and pydantic wrap around it."""

from __future__ import annotations

import sys

import pytest
from pydantic import ValidationError
from pydantic.dataclasses import dataclass

from vllm_nld.errors import LONGEST_MESSAGE, LONGEST_VALUE, NLDError, find, show_plainly, shown, shown_key

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


def test_find_returns_none_without_an_nld_error() -> None:
    assert find(None) is None
    assert find(ValueError("block too long")) is None
    with pytest.raises(ValidationError) as caught:
        Config(size="many")  # type: ignore[arg-type]
    assert find(caught.value) is None


def test_find_ends_on_a_loop() -> None:
    first, second = ValueError(), ValueError()
    first.__cause__, second.__cause__ = second, first
    assert find(first) is None


def test_hook_prints_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
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


class Unprintable:
    def __repr__(self) -> str:
        raise KeyError("no")


def test_short_values_are_shown_unchanged() -> None:
    for value in (1, 0.5, "it's", None, True, ["a", {"b": 2}], {"mode": "ar"}, b"x", float("nan"), -(2**63)):
        assert shown(value) == repr(value)
    assert shown_key("mode") == "mode"
    assert shown_key(3) == "3"


@pytest.mark.parametrize(
    "value",
    [
        "x" * 10**6,
        [["x" * 1000] * 1000] * 1000,
        10**10**6,
        Unprintable(),
        "\ud800\n\x00",
        {"\ud800": "\n"},
        b"\0" * 10**6,
    ],
    ids=["string", "lists", "integer", "repr fails", "surrogate", "dict", "bytes"],
)
def test_other_values_are_cut_and_escaped(value: object) -> None:
    for text in (shown(value), shown_key(value)):
        assert len(text) <= LONGEST_VALUE
        assert text.isprintable()


def test_message_is_one_line_of_bounded_length() -> None:
    message = str(NLDError("begin " + "\ud800\n" * 10**5 + " end"))
    assert len(message) <= LONGEST_MESSAGE
    assert message.isprintable()
    assert message.startswith("begin ")
    assert message.endswith(" end")
    assert str(NLDError("plain \u00e9")) == "plain \u00e9"
