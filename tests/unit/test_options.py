"""``additional_config["nld"]``."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import get_args

import pytest
from annotated_types import Ge, Le

from vllm_nld.errors import NLDError
from vllm_nld.model.engine_config import _asks_for_this_extension
from vllm_nld.options import NLDOptions


@pytest.mark.parametrize(
    ("raw", "threshold"),
    [({}, 0.0), ({"draft_threshold": 0.5}, 0.5), ({"draft_threshold": 1}, 1.0), ({"draft_threshold": 0.0}, 0.0)],
)
def test_good_options_are_accepted(raw: dict[str, object], threshold: float) -> None:
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


def test_options_are_read_from_vllm_config() -> None:
    def read(additional: object) -> float:
        return NLDOptions.from_vllm_config(SimpleNamespace(additional_config=additional)).draft_threshold

    assert read({}) == read({"other": {}}) == 0.0
    assert read(object()) == 0.0
    assert read({"nld": {"draft_threshold": 0.25}}) == 0.25
    with pytest.raises(NLDError, match="None"):
        read({"nld": None})


@pytest.mark.parametrize("key", ["nld.mode", "nld_mode", "NLD.draft_threshold", "nld-mode", "Nld"])
def test_misplaced_key_is_refused(key: str) -> None:
    """vLLM ignores unknown keys of ``additional_config``, so a misspelled default would be lost."""
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


NUMBERS = [
    key
    for key, field in NLDOptions.model_fields.items()
    if {int, float} & (kinds := {field.annotation, *get_args(field.annotation)}) and str not in kinds
]


def test_every_number_has_bounds() -> None:
    assert len(NUMBERS) >= 8
    for key in NUMBERS:
        kinds = {type(bound) for bound in NLDOptions.model_fields[key].metadata}
        assert {Ge, Le} <= kinds, key


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize(
    "value",
    [2**63 - 1, 2**63, 10**400, pytest.param(10**5000, id="5001 digits"), 1e308, math.inf, -math.inf, math.nan, -1],
)
def test_numbers_out_of_bounds_are_refused(key: str, value: float) -> None:
    with pytest.raises(NLDError, match=rf'^additional_config\["nld"\]\.{key}=.*: input should be') as caught:
        NLDOptions.parse({key: value})
    assert len(str(caught.value)) < 300


GOOD = ["off", "auto", "all", 1, 64]


@pytest.mark.parametrize("value", [0, -1, 65, 10**400, 1.0, True, None, "none", "4", [1]])
def test_branches_are_a_number_or_a_name(value: object) -> None:
    with pytest.raises(
        NLDError, match=r"branches=.*: allowed are 'off', 'auto', 'all', or a number from 1 to 64$"
    ) as caught:
        NLDOptions.parse({"branches": value})
    assert len(str(caught.value)) < 300
    assert [NLDOptions.parse({"branches": good}).branches for good in GOOD] == GOOD


HUGE = "x" * 1_000_000
DEEP: list[object] = []
for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    "raw",
    [
        HUGE,
        DEEP,
        {"mode": HUGE},
        {"mode": DEEP},
        {"threshold": DEEP},
        {HUGE: HUGE},
        {f"key{number}": number for number in range(100_000)},
        {"mode": b"\xff" * 1_000_000},
        {10**5000: 10**5000},
        {("a",): 1, None: 2, b"mode": 3},
        {"mode": "\ud800"},
        {"\ud800\n": "\ud800\n"},
        {"mode": {"a": HUGE}},
    ],
    ids=range(13),
)
def test_refusal_of_any_value_is_one_short_line(raw: object) -> None:
    with pytest.raises(NLDError) as caught:
        NLDOptions.parse(raw)
    message = str(caught.value)
    assert len(message) <= 2000
    assert message.isprintable()
    message.encode()  # a response is UTF-8
    assert message.startswith('additional_config["nld"]')
