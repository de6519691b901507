"""Options of a request: ``extra_args["nld"]`` and its HTTP forms."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_nld.errors import NLDError
from vllm_nld.names import MODEL_TYPE, MODEL_TYPES
from vllm_nld.options import MODES_OF_KEY, NLDOptions
from vllm_nld.serving.admission import (
    ENGINE_KEYS,
    EngineTraits,
    check_admission,
    check_defaults,
    request_options,
)


def read(extra_args: Any, traits: EngineTraits | None = None, **params: Any) -> NLDOptions:
    settings = {"bad_words": None, "logprobs": None, "structured_outputs": None}
    traits = traits or EngineTraits(NLDOptions(), 16, Path("learned"))
    return request_options(SimpleNamespace(extra_args=extra_args, **(settings | params)), traits)


@pytest.mark.parametrize("extra_args", [None, {}, {"nld": {}}, {"kv_transfer_params": {}}, {"nld": "{}"}])
def test_default_mode_is_auto(extra_args: Any) -> None:
    assert read(extra_args) == NLDOptions()
    assert read(extra_args).mode == "auto"


@pytest.mark.parametrize(
    "extra_args",
    [
        {"nld": {"mode": "diffusion", "threshold": 0.5, "seed_first": False}},
        {"nld": '{"mode": "diffusion", "threshold": 0.5, "seed_first": false}'},
        {"nld.mode": "diffusion", "nld.threshold": 0.5, "nld.seed_first": 0},
        {"nld": {"mode": "diffusion"}, "nld.threshold": 0.5, "nld.seed_first": False},
    ],
)
def test_three_forms_of_options_are_equal(extra_args: dict[str, Any]) -> None:
    options = read(extra_args)
    assert (options.mode, options.threshold, options.seed_first) == ("diffusion", 0.5, False)


def test_engine_defaults_apply_without_request_options() -> None:
    traits = EngineTraits(NLDOptions(mode="diffusion", threshold=0.7, block_length=8), 16)
    assert read({"nld": {"threshold": 0.4}}, traits) == NLDOptions(mode="diffusion", threshold=0.4, block_length=8)
    assert read({"nld": {"mode": "ar"}}, traits).mode == "ar"


@pytest.mark.parametrize(
    ("nld", "words"),
    [
        ({"mode": "fast"}, [".mode='fast'", "'auto'", "'self_speculation'"]),
        ({"modes": "ar"}, [".modes='ar'", "unknown", "allowed keys: mode"]),
        ({"mode": "diffusion", "threshold": 1.5}, [".threshold=1.5", "less than or equal to 1"]),
        ({"mode": "diffusion", "threshold": "0.5"}, [".threshold='0.5'", "valid number"]),
        ({"mode": "diffusion", "block_length": 17}, [".block_length=17", "2 to 16"]),
        ({"mode": "diffusion", "block_length": 1}, [".block_length=1", "greater than or equal to 2"]),
        ({"mode": "diffusion", "sampler": "best"}, [".sampler='best'", "'top_k'"]),
        ({"mode": "ar", "threshold": 0.5}, [".threshold=0.5", "no effect in mode 'ar'", "diffusion"]),
        ({"threshold": 0.5}, [".threshold=0.5", "no effect in mode 'auto'"]),
        ({"mode": "ar", "block_length": 4}, [".block_length=4", "no effect", "auto, self_speculation, diffusion"]),
        ({"mode": "diffusion", "tokens_per_step": 2}, ["no effect with sampler", "top_k, left_to_right"]),
        ({"mode": "diffusion", "sampler": "top_k", "threshold": 0.5}, ["no effect with sampler 'top_k'"]),
        ({"mode": "diffusion", "max_denoising_steps": 0}, [".max_denoising_steps=0"]),
        ({"mode": "diffusion", "temperature": -1.0}, [".temperature=-1.0"]),
        ([1], ["=[1]", "object"]),
        ("mode=ar", ["'mode=ar'", "JSON"]),
        ('{"a": ' * 100_000, ["is not JSON", "allowed"]),
        ('{"mode": ' + "[" * 100_000 + "]" * 100_000 + "}", ["is not JSON"]),
        ('{"tokens_per_step": ' + "9" * 5000 + "}", ["is not JSON"]),
        ('{"mode": "diffusion", "threshold": 1' + "0" * 400 + "}", [".threshold=", "valid number"]),
        ('{"mode": "diffusion", "threshold": NaN}', [".threshold=nan", "finite number"]),
        ('{"mode": "diffusion", "threshold": -Infinity}', [".threshold=-inf", "finite number"]),
        ('{"mode": "ar", "mode": "diffusion"}', ["a key is given twice"]),
        ("x" * 1_000_000, ["is not JSON", "allowed"]),
        ('{"mode": "diffusion", "temperature": 1e308}', [".temperature=1e+308", "less than or equal to 2"]),
        ("[1]", ["object"]),
    ],
)
def test_bad(nld: Any, words: list[str]) -> None:
    with pytest.raises(NLDError) as caught:
        read({"nld": nld})
    message = str(caught.value)
    assert message.startswith('extra_args["nld"]')
    assert message.isprintable()
    assert len(message) < 1000
    for word in words:
        assert word in message


def test_parameters_without_diffusion_support_are_refused() -> None:
    diffusion = {"nld": {"mode": "diffusion"}}
    with pytest.raises(NLDError, match=r"bad_words=.*out of order"):
        read(diffusion, bad_words=["x"])
    assert read({"nld": {"mode": "self_speculation"}}, bad_words=["x"]).mode == "self_speculation"
    unseeded = {"nld": {"mode": "diffusion", "seed_first": False}}
    with pytest.raises(NLDError, match=r"logprobs=0 .*seed_first=True"):
        read(unseeded, logprobs=0)
    with pytest.raises(NLDError, match="structured_outputs="):
        read(unseeded, structured_outputs=object())
    assert not read(unseeded).seed_first
    assert read(diffusion, logprobs=3, structured_outputs=object()).mode == "diffusion"


def test_engine_without_speculation_allows_only_ar() -> None:
    plain = EngineTraits(NLDOptions(), None)
    assert read({"nld": {"mode": "ar"}}, plain).mode == "ar"
    assert read({}, plain).mode == "auto"
    for mode in ("diffusion", "self_speculation"):
        with pytest.raises(NLDError, match=f"mode='{mode}'.*--speculative-config"):
            read({"nld": {"mode": mode}}, plain)


def test_checkpoint_without_learned_sampler_refuses_it() -> None:
    learned = {"nld": {"mode": "diffusion", "sampler": "learned"}}
    assert read(learned).sampler == "learned"
    with pytest.raises(NLDError, match="learned_sampler"):
        read(learned, EngineTraits(NLDOptions(), 16))


@pytest.mark.parametrize(
    ("nld", "why", "words"),
    [
        ({"branch_length": 4}, None, "branch_length=4 has no effect with branches='off'"),
        ({"branches": 2, "branch_length": 17}, None, "branch_length=17; allowed are 2 to the block length, 16"),
        ({"branches": 2, "branch_length": 9, "block_length": 8}, None, "the block length, 8"),
        ({"branches": 2}, "--enable-lora", "branches=2 with --enable-lora; allowed: 'off'"),
    ],
)
def test_branches_that_would_be_ignored_are_refused(nld: dict[str, Any], why: str | None, words: str) -> None:
    traits = EngineTraits(NLDOptions(), 16, no_branches=why)
    with pytest.raises(NLDError, match=words):
        read({"nld": {"mode": "self_speculation"} | nld}, traits)
    assert read({"nld": {"mode": "self_speculation", "branches": "off"}}, traits).branches == "off"


@pytest.mark.parametrize(
    ("nld", "words"),
    [
        ({"branches": "auto"}, "branches='auto' on vLLM's second model runner; allowed: 'off', 'all', or a number"),
        ({"branches": 2, "branch_length": 65}, "branch_length=65 on vLLM's second model runner; allowed: 2 to 64"),
    ],
)
def test_branches_that_the_second_runner_lacks_are_refused(nld: dict[str, Any], words: str) -> None:
    traits = EngineTraits(NLDOptions(), 100, second=True)
    for mode in ("auto", "self_speculation"):
        with pytest.raises(NLDError, match=re.escape(words)):
            read({"nld": {"mode": mode} | nld}, traits)
        assert read({"nld": {"mode": mode, "branches": 2, "branch_length": 64}}, traits).branches == 2


def test_every_key_except_mode_and_report_has_its_modes() -> None:
    assert {*MODES_OF_KEY, *ENGINE_KEYS, "mode", "report"} == set(NLDOptions.model_fields)


@pytest.mark.parametrize(
    ("scheduler", "model", "words"),
    [
        ("vllm.v1.core.sched.scheduler.Scheduler", "vllm_nld.SelfSpeculation", "--scheduler-cls 'vllm.v1"),
        ("vllm_nld.scheduler.NLDScheduler", None, "started without --speculative-config"),
    ],
)
def test_report_needs_this_extension_s_proposer_and_scheduler(scheduler: str, model: str | None, words: str) -> None:
    config = SimpleNamespace(
        speculative_config=model and SimpleNamespace(model=model, num_speculative_tokens=3),
        scheduler_config=SimpleNamespace(scheduler_cls=scheduler),
        model_config=SimpleNamespace(model="nowhere"),
        lora_config=None,
        additional_config={},
    )
    traits = EngineTraits.of(config)
    settings = {"bad_words": None, "logprobs": None, "structured_outputs": None}
    params = SimpleNamespace(extra_args={"nld.report": 1}, **settings)
    with pytest.raises(NLDError, match=r"report=True with .*" + re.escape(words)):
        request_options(params, traits)
    assert request_options(params, replace(traits, no_report=None)).report


def test_booleans_may_be_numbers() -> None:
    """``vllm_xargs`` has no booleans."""
    options = read({"nld.mode": "self_speculation", "nld.draft_adapter": 0, "nld.sampled_drafts": 0})
    assert (options.draft_adapter, options.sampled_drafts) == (False, False)


def test_adapter_can_only_be_set_for_the_server() -> None:
    with pytest.raises(NLDError, match=r"draft_lora='off' can only be set for the whole server.*--additional-config"):
        read({"nld": {"draft_lora": "off"}})
    with pytest.raises(NLDError, match=r"prompt_lookup=2 has no effect in mode 'ar'"):
        read({"nld": {"mode": "ar", "prompt_lookup": 2}})


@pytest.mark.parametrize("key", ["nld_mode", "nld-mode", "NLD.mode", "NLD", "Nld"])
def test_misspelled_key_is_refused(key: str) -> None:
    with pytest.raises(NLDError) as caught:
        read({key: "diffusion", "nld.mode": "ar"})
    assert f'extra_args["{key}"] is unknown' in str(caught.value)
    assert '"nld.mode"' in str(caught.value)


def test_foreign_keys_are_ignored() -> None:
    assert read({"nldx": 1, "mode": "diffusion", "other.nld.mode": 2}) == NLDOptions()


def test_repeated_key_is_refused() -> None:
    with pytest.raises(NLDError, match=r"\.mode is given twice"):
        read({"nld": {"mode": "ar"}, "nld.mode": "diffusion"})


@pytest.mark.parametrize("extra_args", [[1], "nld", 3, [["nld", {}]]])
def test_extra_args_without_object_are_refused(extra_args: Any) -> None:
    with pytest.raises(NLDError, match=r"^extra_args=.*object"):
        read(extra_args)


def test_keys_that_are_not_strings_are_ignored() -> None:
    assert read({1: 2, None: 3, b"nld": 4, ("nld",): 5}) == NLDOptions()


def test_refused_key_is_shown_short() -> None:
    for extra_args in ({"nld_" + "x" * 1_000_000: 1}, {"nld." + "x" * 1_000_000: 1}, {"nld.\ud800\n": "\ud800"}):
        with pytest.raises(NLDError) as caught:
            read(extra_args)
        message = str(caught.value)
        assert len(message) < 1000
        assert message.isprintable()


def test_defaults_that_would_refuse_every_request_are_refused_at_start_up() -> None:
    check_defaults(EngineTraits(NLDOptions(block_length=16, sampler="learned"), 16, Path("learned")))
    check_defaults(EngineTraits(NLDOptions(block_length=64), None))
    with pytest.raises(NLDError, match=r'^additional_config\["nld"\]\.block_length=17: allowed are 2 to 16'):
        check_defaults(EngineTraits(NLDOptions(block_length=17), 16))
    with pytest.raises(NLDError, match=r'^additional_config\["nld"\]\.sampler=.*no folder learned_sampler'):
        check_defaults(EngineTraits(NLDOptions(sampler="learned"), 16))


@pytest.mark.parametrize("extra_args", [{"\ud800": "auto"}, {"session": "\ud800"}, {"session": ["a", "\udfff"]}])
def test_unsendable_text_is_refused(extra_args: dict[str, Any]) -> None:
    from vllm import SamplingParams

    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=SimpleNamespace(model_type=MODEL_TYPE)),
        nld_traits=EngineTraits(NLDOptions(), 16),
    )
    assert check_admission(config, SamplingParams(extra_args={"session": "grüße"})) is not None
    with pytest.raises(NLDError, match=r"half a surrogate pair"):
        check_admission(config, SamplingParams(extra_args=extra_args))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_unsendable_integer_is_refused(model_type: str) -> None:
    """Of the text model and of the one that reads images."""
    from vllm import SamplingParams

    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=SimpleNamespace(model_type=model_type)),
        nld_traits=EngineTraits(NLDOptions(), 16),
    )
    assert check_admission(config, SamplingParams(thinking_token_budget=2**63)) is not None
    with pytest.raises(NLDError, match=r"^thinking_token_budget=18446744073709551616: allowed are integers of 64 bits"):
        check_admission(config, SamplingParams(thinking_token_budget=2**64))
