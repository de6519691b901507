"""Which token becomes the mask token, and what its row of the embedding is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support import llamas
from vllm_nld.conversion import Options, convert, mask_token, open_source
from vllm_nld.conversion.source import Vocabulary
from vllm_nld.errors import NLDError
from vllm_nld.reference import load_reference

EMBEDDING = "encoder.embed_tokens.weight"


def vocabulary(*texts: str, used: tuple[int, ...] = (0,), size: int = 50) -> Vocabulary:
    return Vocabulary({text: id for id, text in enumerate(texts)}, frozenset(used), size)


@pytest.mark.parametrize(
    ("known", "rows", "id", "text"),
    [
        # A name that says so, "mask" before all others, and never one in use.
        (vocabulary("<s>", "<|python|>", "<|reserved_0|>", "<|reserved_1|>"), 50, 2, "<|reserved_0|>"),
        (vocabulary("<s>", "<unused0>", "<MASK>"), 50, 2, "<MASK>"),
        (vocabulary("<mask>", "<extra_id_7>"), 50, 1, "<extra_id_7>"),
        (vocabulary("<s>", "[PAD151]"), 50, 1, "[PAD151]"),
        # Rows that the tokenizer does not reach, then a new row; other special tokens may mean something.
        (vocabulary("<s>", "<|python|>"), 64, 50, None),
        (vocabulary("<s>", "<|python|>"), 50, 50, None),
        # An id outside the embedding is no row to take.
        (vocabulary("<s>", "<mask>"), 1, 1, None),
    ],
)  # fmt: skip
def test_choice(known: Vocabulary, rows: int, id: int, text: str | None) -> None:
    found = mask_token.choose(None, known, rows)
    assert found == mask_token.MaskToken(id, max(rows, id + 1), text)


def test_a_token_that_is_asked_for() -> None:
    known = vocabulary("<s>", "<|python|>", "<mask>")
    assert mask_token.choose("<|python|>", known, 50) == mask_token.MaskToken(1, 50, "<|python|>")
    assert mask_token.choose("new", known, 50) == mask_token.MaskToken(50, 51, None)


@pytest.mark.parametrize(("asked", "words"), [("<s>", "is in use"), ("the", "is no special token")])
def test_refusals(asked: str, words: str) -> None:
    names = [f"<|reserved_{number}|>" for number in range(20)]
    with pytest.raises(NLDError) as caught:
        mask_token.choose(asked, vocabulary("<s>", *names), 50)
    message = str(caught.value)
    assert message.startswith(f"--mask-token {asked} {words}")
    assert "allowed: new, <|reserved_0|>, <|reserved_1|>" in message
    assert "and 8 more" in message


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("asked", "id"), [(None, llamas.RESERVED), ("<|rare|>", llamas.RARE), ("new", 320)])
def test_its_row_is_the_mean_and_nothing_else_changes(asked: Any, id: int, tied: bool, tmp_path: Path) -> None:
    model = llamas.llama(tie_word_embeddings=tied)
    source = llamas.save_folder(model, tmp_path / "source")
    result = convert(open_source(source), tmp_path / "nld", Options(mask_token=asked))
    assert (result.mask_token_id, result.mask_token) == (
        id,
        "<|reserved_0|>" if asked is None else None if id == 320 else asked,
    )
    before, found = model.model.embed_tokens.weight.detach(), load_file(tmp_path / "nld" / "model.safetensors")
    after = found[EMBEDDING]
    assert len(after) == max(320, id + 1)
    torch.testing.assert_close(after[id], before.mean(0))
    kept = torch.arange(320) != id
    assert torch.equal(after[:320][kept], before[kept])
    if not tied:
        assert torch.equal(found["diffusion_head.weight"][:320], model.lm_head.weight)
        assert len(found["diffusion_head.weight"]) == len(after)
    logits = load_reference(tmp_path / "nld").bidirectional(torch.tensor([[7, id, id]]))
    assert (logits[..., id] == -torch.inf).all()
    assert logits[..., kept.nonzero()[:, 0]].isfinite().all()


@pytest.mark.parametrize("where", ["template", "generation", "config", "tokenizer"])
def test_what_counts_as_in_use(where: str, tmp_path: Path) -> None:
    """Tokens that the model is fed with or stops at are never taken, wherever that is written."""
    source = llamas.save_folder(
        llamas.llama(), tmp_path / "source", **({"pad_token_id": 4} if where == "config" else {})
    )
    if where == "template":
        (source / "chat_template.jinja").write_text("<|reserved_0|>{{ messages }}")
    if where == "generation":
        llamas.write_json(source / "generation_config.json", {"eos_token_id": [1, 4]})
    if where == "tokenizer":
        llamas.write_json(source / "tokenizer_config.json", {"pad_token": {"content": "<|reserved_0|>"}})
    with pytest.raises(NLDError, match=r"--mask-token <\|reserved_0\|> is in use"):
        convert(open_source(source), tmp_path / "nld", Options(mask_token="<|reserved_0|>"))
    assert not (tmp_path / "nld").exists()
