"""``additional_config["nld"]``."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_nld.engine_config import _asks_for_this_extension
from vllm_nld.errors import NLDError
from vllm_nld.options import NLDOptions


@pytest.mark.parametrize(
    ("raw", "threshold"),
    [({}, 0.0), ({"draft_threshold": 0.5}, 0.5), ({"draft_threshold": 1}, 1.0), ({"draft_threshold": 0.0}, 0.0)],
)
def test_good(raw: dict[str, object], threshold: float) -> None:
    assert NLDOptions.parse(raw).draft_threshold == threshold


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"draft_threshold": 1.5}, ["draft_threshold=1.5", "less than or equal to 1"]),
        ({"draft_threshold": -0.1}, ["draft_threshold=-0.1", "greater than or equal to 0"]),
        ({"draft_threshold": "0.5"}, ["draft_threshold='0.5'", "valid number"]),
        ({"draft_threshold": True}, ["draft_threshold=True", "valid number"]),
        ({"draft_threshold": None}, ["draft_threshold=None", "valid number"]),
        ({"draft_threshold": float("nan")}, ["draft_threshold=nan"]),
        ({"treshold": 0.5}, [".treshold=0.5", "unknown", "draft_threshold"]),
        ({"draft_threshold": 2.0, "other": 1}, ["draft_threshold=2.0", ".other=1", "; "]),
        ([], ["=[]", "object"]),
        ("on", ["='on'", "object"]),
        (None, ["=None", "object"]),
    ],
)
def test_bad(raw: object, words: list[str]) -> None:
    with pytest.raises(NLDError) as caught:
        NLDOptions.parse(raw)
    message = str(caught.value)
    assert message.startswith('additional_config["nld"]')
    for word in words:
        assert word in message
    assert "\n" not in message


def test_from_vllm_config() -> None:
    def read(additional: object) -> float:
        return NLDOptions.from_vllm_config(SimpleNamespace(additional_config=additional)).draft_threshold

    assert read({}) == read({"other": {}}) == 0.0
    assert read(object()) == 0.0
    assert read({"nld": {"draft_threshold": 0.25}}) == 0.25
    with pytest.raises(NLDError, match="None"):
        read({"nld": None})


@pytest.mark.parametrize("key", ["nld.mode", "nld_mode", "NLD.draft_threshold", "nld-mode", "Nld"])
def test_a_misplaced_key_is_refused(key: str) -> None:
    """vLLM ignores what it does not know in ``additional_config``; a default that was meant must not be lost so."""
    config = SimpleNamespace(additional_config={key: "ar", "nld": {"mode": "diffusion"}, "nldx": 1, "other.nld": 2})
    with pytest.raises(NLDError) as caught:
        NLDOptions.from_vllm_config(config)
    assert f'additional_config["{key}"] is unknown' in str(caught.value)
    assert '{"nld": {"mode": "ar"}}' in str(caught.value)


@pytest.mark.parametrize("key", ["nld", "nld.mode", "NLD"])
def test_misplaced_keys_count_as_asking_for_the_extension(key: str) -> None:
    config = SimpleNamespace(additional_config={key: {}}, speculative_config=None)
    assert _asks_for_this_extension(config)
    assert not _asks_for_this_extension(SimpleNamespace(additional_config={"nldx": {}}, speculative_config=None))
