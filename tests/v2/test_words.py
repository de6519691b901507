"""What wants a tokenizer: grammars, stop strings, words, thinking budgets; on the embedded checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.engines import counters
from tests.support.second_runner import second_engine
from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.vllm_glue import second_runner
from vllm_nld.vllm_glue.versions import installed_release

NEEDS_THINKING_BUDGET = pytest.mark.skipif(
    installed_release() < (0, 28), reason="this vLLM's second runner has no thinking budget, and says so"
)
PROMPTS = ["def read(self, size=-1):\n    ", "import os\n"]


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    from vllm.config import ReasoningConfig, StructuredOutputsConfig

    settings: dict[str, Any] = {
        "skip_tokenizer_init": False,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "structured_outputs_config": StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True),
        "reasoning_config": ReasoningConfig(
            reasoning_parser="deepseek_r1", reasoning_start_str="<think>", reasoning_end_str="</think>"
        ),
    }
    with second_engine(checkpoint_path("tiny"), **settings) as llm:
        yield llm


def complete(llm: Any, modes: list[str], **settings: Any) -> list[Any]:
    """Every prompt in every mode, in one batch; returns completions by mode, then prompt."""
    from vllm import SamplingParams

    own = {"temperature": 0, "max_tokens": 16}
    asked = [SamplingParams(**(own | settings | {"extra_args": {"nld": {"mode": mode}}})) for mode in modes]
    params = [each for each in asked for _ in PROMPTS]
    return [output.outputs[0] for output in llm.generate(PROMPTS * len(modes), params, use_tqdm=False)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_grammars_are_kept(llm: Any, temperature: float) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    pattern = r"[a-z]{3,8}=\d{1,4};"
    found = complete(
        llm,
        ["ar", "self_speculation"],
        structured_outputs=StructuredOutputsParams(regex=pattern),
        temperature=temperature,
        seed=5 if temperature else None,
    )
    texts = [completion.text for completion in found]
    assert all(re.fullmatch(pattern, text) for text in texts), texts
    assert texts[:2] == texts[2:]


@pytest.mark.parametrize(
    "settings",
    [
        {"stop": ["self", "(", "import"]},
        {"bad_words": ["self", " import"]},
        pytest.param({"thinking_token_budget": 4}, marks=NEEDS_THINKING_BUDGET),
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_words_are_as_in_ar(llm: Any, settings: dict[str, Any]) -> None:
    """Texts are compared: early vLLMs keep the tokens that a step decided after a stop string."""
    found = complete(llm, ["ar", "self_speculation"], **settings)
    assert [own.text for own in found[:2]] == [own.text for own in found[2:]]
    assert [own.finish_reason for own in found[:2]] == [own.finish_reason for own in found[2:]]


def test_words_that_drafts_would_end_are_kept_without_drafts_on_old_versions(
    llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drafts(word: str) -> tuple[bool, bool]:
        """Whether there were draft passes, and places for drafts in steps."""
        before = counters(llm)
        complete(llm, ["self_speculation"], bad_words=[word])
        after = counters(llm)
        return after["draft_forwards"] > before["draft_forwards"], after["cycles"] > before["cycles"]

    monkeypatch.setattr(second_runner, "installed_release", lambda: (0, 27))
    assert drafts("collections") == (False, False)
    assert drafts("self") == (True, True)  # one token
    monkeypatch.setattr(second_runner, "installed_release", lambda: (0, 28))
    assert drafts("collections") == (True, True)
