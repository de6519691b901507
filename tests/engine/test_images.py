"""Images in engines, on random weights in float32: every mode answers as the dense reference does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.adapters import random_adapter
from tests.support.engines import accepted, engine, generate, runner, watch_blocks
from tests.support.images import Ask, Oracle, complete, needs_images, picture, texts
from tests.support.models import save_vlm, small_vlm_config
from vllm_nld.checkpoints.draft_lora import TARGETS
from vllm_nld.errors import NLDError

START = 18
ASKS = [
    Ask([7, START, 8, 9], [picture(1)]),
    Ask([7, START, 8, 9], [picture(2)]),  # as long as the first, and other pixels
    Ask([START, 8, START, 11, 6, 7], [picture(2), picture(3, 300, 170)]),  # the second is too large, and shrinks
    Ask([7, 8, 9, 10]),
    Ask([START], [picture(4, 1, 1)]),
    Ask([9] * 40 + [START, 6, START, 7, START], [picture(5, 29, 57), picture(1), picture(6, 8, 200)]),
]
SETTINGS: dict[str, Any] = {"max_num_seqs": 6, "max_model_len": 200, "limit_mm_per_prompt": {"image": 3}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs_images()
    return save_vlm(small_vlm_config(), tmp_path_factory.mktemp("images"), seed=1)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)


@pytest.fixture(scope="module")
def expected(oracle: Oracle) -> list[list[int]]:
    return [oracle.answer(ask, "ar") for ask in ASKS]


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[Any]:
    with engine(folder, spec=True, **SETTINGS) as llm:
        yield llm


def modes(*names: str) -> list[dict[str, Any]]:
    return [{"mode": name} for name in names]


def test_prompts_hold_the_tokens_of_their_images(llm: Any, oracle: Oracle) -> None:
    outputs = complete(llm, ASKS, modes("ar") * len(ASKS), tokens=1)
    assert [list(output.prompt_token_ids) for output in outputs] == [oracle.prompt(ask)[0] for ask in ASKS]


@pytest.mark.parametrize("mode", ["ar", "self_speculation", "auto"])
def test_text_equals_the_reference(mode: str, llm: Any, expected: list[list[int]]) -> None:
    before = accepted(llm)
    assert texts(complete(llm, ASKS, modes(mode) * len(ASKS))) == expected
    assert mode != "self_speculation" or accepted(llm) > before
    assert len({tuple(text) for text in expected}) == len(expected), "pictures make a difference"


def test_diffusion_equals_the_reference(llm: Any, oracle: Oracle) -> None:
    outputs = complete(llm, ASKS, [{"mode": "diffusion", "threshold": 0.5}] * len(ASKS))
    assert texts(outputs) == [oracle.answer(ask, "diffusion", threshold=0.5) for ask in ASKS]


def test_modes_mix_in_a_batch(llm: Any, oracle: Oracle, expected: list[list[int]]) -> None:
    mixed = modes("diffusion", "ar", "self_speculation", "diffusion", "auto", "self_speculation")
    diffused = {row: oracle.answer(ASKS[row], "diffusion") for row in (0, 3)}
    assert texts(complete(llm, ASKS, mixed)) == [diffused.get(row, text) for row, text in enumerate(expected)]


def test_drafts_equal_the_reference(llm: Any, oracle: Oracle) -> None:
    """Same drafts, block by block, so the acceptance is that of the reference, too."""
    blocks: list[list[int]] = []
    watch_blocks(llm, lambda block: blocks.append(list(block.tokens)))
    for ask in ASKS[1:4]:
        blocks.clear()
        complete(llm, [ask], modes("self_speculation"))
        wanted = oracle.generation(ask, "self_speculation").drafts
        assert blocks == [block for block in wanted if len(block) > 1]


def test_looked_up_drafts_change_no_text(llm: Any, expected: list[list[int]]) -> None:
    """The prompts repeat the tokens of images, which are never drafted."""
    options = [{"mode": "self_speculation", "prompt_lookup": 1}] * 3
    assert texts(complete(llm, ASKS[1:4], options)) == expected[1:4]


def test_sampled_text_is_seeded_and_holds_no_mask(llm: Any, oracle: Oracle) -> None:
    params = {"temperature": 2.0, "seed": 5, "tokens": 30}
    first, again = (texts(complete(llm, ASKS[1:4], modes("self_speculation") * 3, **params)) for _ in range(2))
    assert first == again
    assert oracle.config.mask_token_id not in {token for text in first for token in text}


@pytest.mark.parametrize(
    ("ask", "options", "words"),
    [
        (Ask([7, START, START, START, START], [picture(1)] * 4), {}, "At most 3 image"),
        (Ask([7, 8], [picture(1)]), {}, r"1 image\(s\), but the prompt has 0 place\(s\) for one: <\|image_start\|>"),
        (Ask([7, START, 8], [picture(1), picture(2)]), {}, r"2 image\(s\), but the prompt has 1 place"),
        (Ask([START], [picture(1)]), {"max_image_size": 252}, "max_image_size=252; allowed: 28 to 224 pixels"),
        (Ask([START], [picture(1)]), {"max_image_size": "9"}, "max_image_size='9'; allowed: 28 to 224 pixels"),
        (Ask([START], [picture(1)]), {"size": 28}, "unknown key 'size'; allowed: max_image_size"),
        (Ask([START], [np.zeros((3, 28, 28), np.float32)]), {}, "array of float32"),  # type: ignore[list-item]
        (Ask([START] * 3, [picture(7, 224, 224)] * 3), {}, "maximum model length of 200"),  # 3 x 73 tokens
    ],
)
def test_unsuitable_requests_are_refused(ask: Ask, options: dict[str, Any], words: str, llm: Any) -> None:
    prompt = ask.as_prompt() | ({"mm_processor_kwargs": options} if options else {})
    with pytest.raises(Exception, match=words) as caught:
        llm.generate([prompt], use_tqdm=False)
    from vllm.exceptions import VLLMClientError

    assert isinstance(caught.value, (ValueError, VLLMClientError))  # the server's answer is HTTP 400
    assert len(texts(complete(llm, [ASKS[0]], modes("ar"), tokens=2))[0]) == 2


def test_a_request_may_ask_for_smaller_images(llm: Any, folder: Path) -> None:
    from vllm import SamplingParams

    ask, small = Ask([7, START, 8], [picture(3, 300, 170)]), Oracle(folder, longest=56)
    prompt = ask.as_prompt() | {"mm_processor_kwargs": {"max_image_size": 56}}
    params = SamplingParams(temperature=0, max_tokens=12, detokenize=False)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    assert list(output.prompt_token_ids) == small.prompt(ask)[0]
    assert texts([output]) == [small.answer(ask, "ar", 12)]


def test_arrays_are_pictures(llm: Any, expected: list[list[int]]) -> None:
    values = np.asarray(ASKS[0].pictures[0])
    for array in (values, values.transpose(2, 0, 1), torch.from_numpy(values.copy())):
        ask = Ask(ASKS[0].ids, [array])  # type: ignore[list-item]
        assert texts(complete(llm, [ask], modes("ar"))) == [expected[0]]


def test_chunked_prefill_and_cached_prefixes(folder: Path, oracle: Oracle) -> None:
    """Steps of 12 tokens end inside images of 46. The second round finds prefixes of the same images only."""
    settings = SETTINGS | {"max_num_batched_tokens": 12, "enable_prefix_caching": True, "block_size": 32}
    asks = [
        Ask([START, 6, 9], [picture(7, 224, 140)]),
        Ask([START, 6, 9], [picture(8, 224, 140)]),  # the same tokens, another picture
        Ask([START, 6, 9, 6], [picture(7, 224, 140)]),
        ASKS[3],
    ]
    wanted = [oracle.answer(ask, "ar", 12) for ask in asks]
    with engine(folder, spec=True, **settings) as llm:
        first = [complete(llm, [ask], modes("self_speculation"), 12)[0] for ask in asks]
        assert texts(first) == wanted
        assert [output.num_cached_tokens for output in first] == [0, 0, 32, 0]
        second = complete(llm, asks, modes("self_speculation") * 4, 12)
        assert texts(second) == wanted
        assert [output.num_cached_tokens for output in second] == [32, 32, 32, 0]
        third = complete(llm, asks[:2], modes("diffusion", "ar"), 12)
        assert texts(third) == [oracle.answer(asks[0], "diffusion", 12), wanted[1]]


@pytest.mark.parametrize("images", [3, 0])
def test_compiled_models_draft_as_they_are_called(images: int, folder: Path, oracle: Oracle) -> None:
    """With images vLLM calls the model with embeddings, and without with ids; no guard tells the graphs apart."""
    settings = SETTINGS | {"limit_mm_per_prompt": {"image": images}, "enforce_eager": False}
    graphs = {"mode": "DYNAMO_TRACE_ONCE", "backend": "eager"}
    asks = ASKS[1:4] if images else [ASKS[3]]
    with engine(folder, spec=True, compilation_config=graphs, **settings) as llm:
        assert runner(llm).drafter.draft_pass.embeds == bool(images)
        blocks: list[list[int]] = []
        watch_blocks(llm, lambda block: blocks.append(list(block.tokens)))
        for ask in asks:
            blocks.clear()
            outputs = complete(llm, [ask], modes("self_speculation"), 12)
            wanted = oracle.generation(ask, "self_speculation", 12)
            assert texts(outputs) == [oracle.answer(ask, "ar", 12)]
            assert blocks == [block for block in wanted.drafts if len(block) > 1]


def test_draft_adapter_by_path(folder: Path, oracle: Oracle, expected: list[list[int]], tmp_path: Path) -> None:
    """It was made for the text model, of the same shape; its mask row depends on the forward that reads it."""
    adapter = random_adapter(oracle.config.text_config, seed=2, targets=TARGETS, mask_row=True, size=0.15)
    adapter.write(tmp_path, "the text model")
    blocks: list[list[int]] = []
    with engine(folder, spec=True, options={"draft_lora": str(tmp_path)}, **SETTINGS) as llm:
        watch_blocks(llm, lambda block: blocks.append(list(block.tokens)))
        for ask, text in zip(ASKS[1:4], expected[1:4], strict=True):
            blocks.clear()
            assert texts(complete(llm, [ask], modes("self_speculation"))) == [text]
            oracle.model.draft_adapter = adapter
            wanted = oracle.generation(ask, "self_speculation").drafts
            oracle.model.draft_adapter = None
            assert blocks == [block for block in wanted if len(block) > 1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mm_processor_kwargs": {"max_image_size": 20}}, "mm_processor_kwargs.max_image_size=20; allowed: 28 to 224"),
        ({"mm_processor_kwargs": {"longest_edge": 56}}, "unknown key 'longest_edge'; allowed: max_image_size"),
        ({"enable_mm_embeds": True}, "enable_mm_embeds=True"),
    ],
)
def test_unsuitable_engine_options_are_refused(settings: dict[str, Any], words: str, folder: Path) -> None:
    with pytest.raises(Exception, match=words) as caught, engine(folder, spec=True, **SETTINGS, **settings):
        pass
    from vllm_nld.errors import find

    assert isinstance(find(caught.value), NLDError)


def test_the_added_mask_token_is_never_emitted(tmp_path: Path) -> None:
    """Weights that make it win many an argmax if it were allowed to."""
    needs_images()
    config = small_vlm_config(added_mask_token_id=7)
    folder = save_vlm(config, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["diffusion_head.weight"][7] = 3.0
    save_file(tensors, folder / "model.safetensors")
    each: list[dict[str, Any]] = [{"mode": mode} for mode in ("ar", "self_speculation", "diffusion")]
    with engine(folder, spec=True) as llm:
        texts = generate(llm, [[9, 10, 11]] * 3, each, max_tokens=24)
    assert texts[0] == texts[1]
    assert 7 not in {token for ids in texts for token in ids}
