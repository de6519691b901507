"""Every field of vLLM's SpeculativeConfig is honored, refused by name, or known to be checked elsewhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from vllm.config import SpeculativeConfig

from vllm_nld.errors import NLDError
from vllm_nld.model.speculative_keys import (
    CHECKED_ELSEWHERE,
    FILLED_BY_VLLM,
    HONORED,
    INSTEAD,
    check_speculative_keys,
    default_of,
)

FIELDS = {field.name: field for field in dataclasses.fields(SpeculativeConfig)}
MEANT_FOR_OTHERS = {
    "disable_eagle_block_drop",
    "dspark_draft_topk",
    "enable_adaptive_verification",
    "index_share_for_mtp_iteration",
    "suffix_decoding_max_cached_requests",
    "suffix_decoding_max_spec_factor",
    "suffix_decoding_max_tree_depth",
    "suffix_decoding_min_token_prob",
    "use_heterogeneous_vocab",
    "use_local_argmax_reduction",
}
"""Refused without a hint, because they belong to named draft methods."""


def given(**values: Any) -> Any:
    """A config as vLLM's __post_init__ finds it: the user's values, nothing filled in."""
    config = object.__new__(SpeculativeConfig)
    for name, field in FIELDS.items():
        object.__setattr__(config, name, values.get(name, default_of(field)))
    object.__setattr__(config, "model", "vllm_nld.SelfSpeculation")
    return config


def another(value: Any) -> Any:
    """A value that is not the default."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else "other"


def test_every_field_of_vllm_is_known() -> None:
    """A new field is refused until it is checked: honor it, or add it to the fields that are refused by name."""
    known = {*HONORED, *CHECKED_ELSEWHERE, *FILLED_BY_VLLM, *INSTEAD, *MEANT_FOR_OTHERS}
    assert set(FIELDS) <= known


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - {*HONORED, *CHECKED_ELSEWHERE, *FILLED_BY_VLLM}))
def test_key_without_effect_is_refused_by_name(name: str) -> None:
    value = another(default_of(FIELDS[name]))
    with pytest.raises(NLDError) as caught:
        check_speculative_keys(given(**{name: value}))
    message = str(caught.value)
    assert message.startswith(f"speculative_config.{name}={value!r} has no effect")
    assert "allowed: leave it out" in message


def test_honored_keys_and_defaults_pass() -> None:
    check_speculative_keys(given())
    check_speculative_keys(given(num_speculative_tokens=7, method="custom_class", rejection_sample_method="standard"))
    check_speculative_keys(given(prompt_lookup_max=0, prompt_lookup_min=0, draft_model_config=object()))


@pytest.mark.parametrize("method", ["ngram", "draft_model", "eagle"])
def test_other_methods_are_refused(method: str) -> None:
    with pytest.raises(NLDError, match=rf"speculative_config\.method='{method}'.*leave method out"):
        check_speculative_keys(given(method=method))
