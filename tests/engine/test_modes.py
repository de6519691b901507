"""What users of vLLM expect of a request, in every mode, on the embedded checkpoint's first layers in float32."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engines import engine, metric
from tests.support.models import save_first_layers
from vllm_nld.checkpoints.held_out import held_out_prompts
from vllm_nld.draft_pass.learned_sampler import LearnedSampler
from vllm_nld.reference import ReferenceModel, ar_generate, load_reference
from vllm_nld.reference import generate as reference_generate

MODES = ["ar", "self_speculation", "diffusion", "auto"]
LOSSLESS = ["self_speculation", "auto"]
THINK, END_THINK = 12, 13
TEXTS = [text for _, text in held_out_prompts(4, characters=150)]
TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_first_layers(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[Any]:
    from vllm.config import StructuredOutputsConfig
    from vllm.config.reasoning import ReasoningConfig

    settings = {
        "skip_tokenizer_init": False,
        "max_num_seqs": 8,
        "max_model_len": 1024,
        "enable_prefix_caching": True,
        "block_size": 32,
        # A model this small would fill its answer with white space, which a JSON grammar allows without limit.
        "structured_outputs_config": StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True),
        "reasoning_config": ReasoningConfig(
            reasoning_parser="deepseek_r1", reasoning_start_str="<think>", reasoning_end_str="</think>"
        ),
    }
    with engine(folder, spec=True, **settings) as made:
        yield made


@pytest.fixture(scope="module")
def model(folder: Path) -> ReferenceModel:
    return load_reference(folder)


def complete(llm: Any, prompts: list[Any], mode: str, nld: dict[str, Any] | None = None, **params: Any) -> list[Any]:
    from vllm import SamplingParams

    extra = {"extra_args": {"nld": {"mode": mode, **(nld or {})}}}
    settings = SamplingParams(**({"temperature": 0, "max_tokens": TOKENS} | extra | params))
    return llm.generate(prompts, settings, use_tqdm=False)


def ids_of(outputs: list[Any]) -> list[list[int]]:
    return [list(completion.token_ids) for output in outputs for completion in output.outputs]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"min_tokens": 20, "stop_token_ids": [11, 30, 40]},
        {"stop": ["\n"]},
        {"allowed_token_ids": list(range(20, 200))},
        {"bad_words": ["self", " ="]},
        {"prompt_logprobs": 1},
        {"ignore_eos": True},
    ],
    ids=lambda params: ",".join(params) or "plain",
)
def test_lossless_modes_give_the_text_of_ar(llm: Any, params: dict[str, Any]) -> None:
    expected = ids_of(complete(llm, TEXTS, "ar", **params))
    for mode in LOSSLESS:
        assert ids_of(complete(llm, TEXTS, mode, **params)) == expected, mode


@pytest.mark.parametrize("mode", MODES)
def test_stop_strings_and_minimum(llm: Any, mode: str) -> None:
    for output in complete(llm, TEXTS, mode, stop=["\n"]):
        assert "\n" not in output.outputs[0].text
    stops = [11, 30, 40, 50]
    for ids in ids_of(complete(llm, TEXTS, mode, min_tokens=20, stop_token_ids=stops)):
        assert len(ids) >= 20
        assert not set(ids[:19]) & set(stops)


@pytest.mark.parametrize("mode", MODES)
def test_equal_seed_gives_equal_text_in_any_batch(llm: Any, mode: str) -> None:
    alone = ids_of(complete(llm, TEXTS[:1], mode, temperature=1.0, seed=5))
    crowd = ids_of(complete(llm, TEXTS, mode, temperature=1.0, seed=5))
    assert crowd[0] == alone[0]
    assert ids_of(complete(llm, TEXTS[:1], mode, temperature=1.0, seed=6)) != alone
    assert ids_of(complete(llm, TEXTS, mode, temperature=1.0, seed=5)) == crowd


@pytest.mark.parametrize("mode", MODES)
def test_several_samples_of_one_prompt(llm: Any, mode: str) -> None:
    (output,) = complete(llm, TEXTS[:1], mode, temperature=1.0, n=3)
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 3


SCHEMA = {
    "type": "object",
    "properties": {
        "if": {"enum": ["int", "str"]},
        "no": {"type": "integer", "minimum": 0, "maximum": 99},
        "or": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["if", "no", "or"],
    "additionalProperties": False,
}
"""With names of few tokens, because each token that the grammar forces takes a forward."""


def is_valid(kind: str, text: str) -> bool:
    if kind == "choice":
        return text in ("yes", "no", "import os")
    if kind == "regex":
        return re.fullmatch(r"[a-z]{3,8}=\d{1,4};", text) is not None
    found = json.loads(text)
    return (
        set(found) == {"if", "no", "or"}
        and found["if"] in ("int", "str")
        and isinstance(found["no"], int)
        and 1 <= len(found["or"]) <= 2
        and set(found["or"]) <= {"a", "b"}
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["json", "regex", "choice"])
def test_structured_output_is_always_valid(llm: Any, kind: str, temperature: float) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    grammar: dict[str, dict[str, Any]] = {
        "json": {"json": SCHEMA},
        "regex": {"regex": r"[a-z]{3,8}=\d{1,4};"},
        "choice": {"choice": ["yes", "no", "import os"]},
    }
    texts: dict[str, list[str]] = {}
    for mode in MODES:
        params = {"structured_outputs": StructuredOutputsParams(**grammar[kind]), "temperature": temperature}
        # Diffusion runs a block again from where the grammar cuts it, so short blocks take fewer forwards.
        nld = {"block_length": 8} if mode == "diffusion" else {}
        outputs = complete(llm, TEXTS[:2], mode, nld, max_tokens=100, **params)
        texts[mode] = [output.outputs[0].text for output in outputs]
        assert all(is_valid(kind, text) for text in texts[mode]), (mode, texts[mode])
    if temperature == 0:
        assert texts["self_speculation"] == texts["ar"] == texts["auto"]


@pytest.mark.parametrize("mode", MODES)
def test_logprobs_come_from_the_causal_pass(llm: Any, mode: str, model: ReferenceModel) -> None:
    """Also for diffusion's tokens: the causal pass's value for the token after everything before it."""
    (output,) = complete(llm, TEXTS[:1], mode, logprobs=2, max_tokens=20)
    prompt, tokens = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
    expected = model.causal(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1].log_softmax(-1)
    for row, (token, entry) in enumerate(zip(tokens, output.outputs[0].logprobs, strict=True)):
        assert token in entry
        for id_, found in entry.items():
            assert abs(found.logprob - float(expected[row, id_])) < 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_cached_prefix_changes_nothing(llm: Any, mode: str) -> None:
    before = metric(llm, "vllm:prefix_cache_hits")
    first = ids_of(complete(llm, TEXTS, mode))
    assert ids_of(complete(llm, TEXTS, mode)) == first
    assert metric(llm, "vllm:prefix_cache_hits") > before


def test_diffusion_equals_the_reference_on_trained_weights(llm: Any, folder: Path, model: ReferenceModel) -> None:
    learned = LearnedSampler.load(folder / "learned_sampler")
    for nld in (
        {"threshold": 0.7},
        {"sampler": "entropy_budget"},
        {"sampler": "learned", "threshold": 0.8},
        {"sampler": "learned", "threshold": 0.6, "block_length": 8},
    ):
        for output in complete(llm, TEXTS[:2], "diffusion", nld, max_tokens=32):
            prompt = list(output.prompt_token_ids)
            expected = reference_generate(model, prompt, 32, learned=learned, **nld)
            assert list(output.outputs[0].token_ids) == expected.ids[len(prompt) :]


def test_diffusion_obeys_penalties_and_allowed_tokens(llm: Any) -> None:
    """One position per forward, left to right: every token attends to all earlier ones."""
    serial = {"sampler": "left_to_right", "tokens_per_step": 1}
    plain = ids_of(complete(llm, TEXTS, "diffusion", serial))
    assert any(len(set(ids)) < len(ids) for ids in plain)
    for ids in ids_of(complete(llm, TEXTS, "diffusion", serial, repetition_penalty=1000.0)):
        assert len(set(ids)) == len(ids)
    for ids in ids_of(complete(llm, TEXTS, "diffusion", {"threshold": 0.5}, allowed_token_ids=list(range(20, 60)))):
        assert set(ids) <= set(range(20, 60))


def test_diffusion_uses_its_own_temperature(llm: Any) -> None:
    """Seeds at temperature 0, denoising at 1: the first token equals AR's, the rest differs from run to run."""
    runs = [ids_of(complete(llm, TEXTS[:1], "diffusion", {"temperature": 1.0}, temperature=0))[0] for _ in range(3)]
    assert len({ids[0] for ids in runs}) == 1
    assert len({tuple(ids) for ids in runs}) > 1
    seeded = [
        ids_of(complete(llm, TEXTS[:1], "diffusion", {"temperature": 1.0}, temperature=0, seed=3))[0] for _ in range(2)
    ]
    assert seeded[0] == seeded[1]


@pytest.mark.parametrize("budget", [0, 7, 16])
def test_thinking_budget_forces_the_end_token(llm: Any, budget: int, model: ReferenceModel) -> None:
    """The end token comes exactly where the budget ends, and the text equals the reference's, in every mode."""
    prompts = [[*output.prompt_token_ids, THINK] for output in complete(llm, TEXTS[:2], "ar", max_tokens=1)]
    settings = {"max_thinking_tokens": budget, "end_think_token_id": END_THINK}
    causal = [ar_generate(model, ids, 32, **settings).ids[len(ids) :] for ids in prompts]
    diffused = [reference_generate(model, ids, 32, threshold=0.9, **settings).ids[len(ids) :] for ids in prompts]
    for mode in MODES:
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        texts = ids_of(complete(llm, inputs, mode, thinking_token_budget=budget, max_tokens=32))
        assert texts == (diffused if mode == "diffusion" else causal), mode
        for tokens in texts:
            assert tokens[budget] == END_THINK or END_THINK in tokens[:budget] or len(tokens) <= budget


def test_bad_requests_are_refused_and_engine_continues(llm: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    for nld in ({"mode": "fast"}, {"mode": "ar", "threshold": 0.5}, {"block_length": 400}, {"typo": 1}):
        with pytest.raises(VLLMValidationError, match=r'extra_args\["nld"\]'):
            complete(llm, TEXTS[:1], **({"mode": "auto"} | {"nld": nld}))
    with pytest.raises(VLLMValidationError, match="bad_words"):
        complete(llm, TEXTS[:1], "diffusion", bad_words=["x"])
    assert len(ids_of(complete(llm, TEXTS[:1], "diffusion"))[0]) == TOKENS
