"""GGUF files, written here by the library: weights, rotary variants, tokenizers, and what is refused."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from tests.support import llamas
from vllm_nld.config import NemotronLabsDiffusionConfig
from vllm_nld.conversion import Options, convert, open_source
from vllm_nld.conversion.gguf_source import GGUFSource
from vllm_nld.errors import NLDError
from vllm_nld.reference import load_reference
from vllm_nld.reference.rope import inverse_frequencies

gguf = pytest.importorskip("gguf")
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
IDS = torch.randint(6, 320, (150,), generator=torch.Generator().manual_seed(3))


def logits(folder: Path) -> torch.Tensor:
    return load_reference(folder).causal(IDS[None])[0]


def expected_logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS[None]).logits[0]


def close(found: torch.Tensor, expected: torch.Tensor, mask: int = llamas.RESERVED) -> None:
    others = torch.arange(320) != mask
    torch.testing.assert_close(found[:, :320][:, others], expected[:, others], atol=3e-4, rtol=0)


def converted(file: Path, **options: Any) -> Any:
    return convert(open_source(file), file.parent / "nld", Options(**options))


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "bfloat16"), ("Q4_1", "bfloat16")],
)
def test_logits_equal_transformers(quantization: str, dtype: str, tmp_path: Path) -> None:
    """transformers computes with what is in the file: the weights as they are after quantization."""
    model = llamas.llama(num_key_value_heads=1, head_dim=32, tie_word_embeddings=quantization != "F16")
    file = llamas.save_gguf(model, tmp_path / "model.gguf", quantization)
    kind = gguf.GGMLQuantizationType[quantization]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                stored = gguf.dequantize(gguf.quantize(parameter.numpy(), kind), kind)
                parameter.copy_(torch.from_numpy(np.array(stored)))
    result = converted(file, dtype="float32")
    close(logits(tmp_path / "nld"), expected_logits(model))
    assert result.tied == model.config.tie_word_embeddings
    assert result.agreement.difference < 3e-4
    assert str(open_source(file).dtype) == f"torch.{dtype}"


def test_llama3s_scaling_is_found_in_the_tensor_it_ends_up_in(tmp_path: Path) -> None:
    model = llamas.llama(rope_parameters=LLAMA3, max_position_embeddings=131072)
    divisors = inverse_frequencies(16, LLAMA3 | {"rope_type": "default"}) / inverse_frequencies(16, LLAMA3)
    assert divisors.max() > 31
    tensors = {"rope_freqs.weight": divisors.float().numpy()}
    converted(llamas.save_gguf(model, tmp_path / "model.gguf", tensors=tensors))
    config = NemotronLabsDiffusionConfig.from_pretrained(tmp_path / "nld")
    assert config.rope_parameters == LLAMA3
    close(logits(tmp_path / "nld"), expected_logits(model))


def test_linear_scaling(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    model = llamas.llama(rope_parameters=rope)
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    converted(llamas.save_gguf(model, tmp_path / "model.gguf", metadata=metadata))
    assert NemotronLabsDiffusionConfig.from_pretrained(tmp_path / "nld").rope_parameters == rope
    close(logits(tmp_path / "nld"), expected_logits(model))


def test_the_check_knows_which_rows_are_rotated_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_nld.conversion import gguf_source

    file = llamas.save_gguf(llamas.llama(), tmp_path / "model.gguf")
    monkeypatch.setattr(gguf_source, "_halves", lambda weight, heads: weight)
    with pytest.raises(NLDError, match="logits differ"):
        converted(file)


@pytest.mark.parametrize("splitter", ["gpt-2", "smollm"])
def test_byte_pair_tokenizers(splitter: str, tmp_path: Path) -> None:
    converted(llamas.save_gguf(llamas.llama(), tmp_path / "model.gguf", splitter=splitter), check=False)
    found = Tokenizer.from_file(str(tmp_path / "nld" / "tokenizer.json"))
    original = llamas.tokenizer(splitter)
    for text in [*llamas.TEXT, "<|user|>12345 <s>\u00e9\U0001f642\t x</s>", "   ", ""]:
        assert found.encode(text).ids == original.encode(text).ids, text
        assert found.decode(found.encode(text).ids) == original.decode(original.encode(text).ids)


def test_llama3s_splitter() -> None:
    """At most three digits together, and white space as that pattern has it; a begin token unless the file says no."""
    from vllm_nld.conversion import gguf_tokenizer

    splitter = gguf_tokenizer._SPLITTERS["llama-bpe"]()
    pieces = [piece for piece, _ in splitter.pre_tokenize_str("It's 12345  x\n\n y")]
    assert pieces == ["It", "'s", "\u0120", "123", "45", "\u0120", "\u0120x", "\u010a\u010a", "\u0120y"]
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.bos_token_id": 0}
    assert gguf_tokenizer.adds_bos(metadata.get)
    assert not gguf_tokenizer.adds_bos((metadata | {"tokenizer.ggml.add_bos_token": False}).get)
    assert not gguf_tokenizer.adds_bos((metadata | {"tokenizer.ggml.pre": "gpt-2"}).get)


def test_chat_template_and_special_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    metadata = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.eot_token_id": 3}
    converted(llamas.save_gguf(llamas.llama(), tmp_path / "model.gguf", metadata=metadata))
    found = AutoTokenizer.from_pretrained(str(tmp_path / "nld"))
    assert (found.bos_token, found.eos_token, found.unk_token) == ("<s>", "</s>", "<unk>")
    assert found.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "<|user|>Hi</s>"
    assert found.encode("x") == [llamas.BEGIN, *llamas.tokenizer().encode("x").ids]
    assert json.loads((tmp_path / "nld" / "generation_config.json").read_text())["eos_token_id"] == [1, 3]


def test_sentencepiece_tokenizers_cut_text_as_sentencepiece_does(tmp_path: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(llamas.TEXT), model_writer=model, vocab_size=420, model_type="bpe", byte_fallback=True,
        character_coverage=0.98, minloglevel=2, normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    oracle = spm.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(len(oracle))
    kinds = [
        2 if oracle.is_unknown(id) else 3 if oracle.is_control(id) else 6 if oracle.is_byte(id) else 1 for id in ids
    ]
    metadata = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": None, "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": [oracle.id_to_piece(id) for id in ids], "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [oracle.get_score(id) for id in ids],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip
    result = converted(llamas.save_gguf(llamas.llama(vocab_size=420), tmp_path / "model.gguf", metadata=metadata))
    found = Tokenizer.from_file(str(tmp_path / "nld" / "tokenizer.json"))
    for text in [
        *(line for line in llamas.TEXT if line and "<" not in line),
        "na\u00efve \u6f22\u5b57 \U0001f642",
        "  two  spaces ",
    ]:
        assert found.encode(text, add_special_tokens=False).ids == oracle.encode(text), text
        assert found.decode(found.encode(text).ids) == text
    assert found.encode("x").ids[0] == 1
    assert (result.mask_token_id, result.mask_token) == (420, None), "nothing is free: a row of its own"


@pytest.mark.parametrize(
    ("metadata", "tensors", "words"),
    [
        ({"general.architecture": "qwen2"}, {}, ["general.architecture='qwen2'", "allowed: llama"]),
        ({"split.count": 3}, {}, ["one of 3 files"]),
        ({"llama.expert_count": 8}, {}, ["llama.expert_count=8"]),
        ({"llama.attention.sliding_window": 64}, {}, ["sliding_window=64"]),
        ({"llama.rope.scaling.type": "yarn"}, {}, ["rope.scaling.type='yarn'", "none, linear"]),
        ({"llama.rope.dimension_count": 8}, {}, ["rope.dimension_count=8", "16"]),
        ({"llama.feed_forward_length": None}, {}, ["metadata llama.feed_forward_length is missing"]),
        ({"llama.feed_forward_length": 100}, {}, ["ffn_gate.weight has shape [96, 64], metadata asks for [100, 64]"]),
        ({"llama.attention.head_count": [4, 2]}, {}, ["head_count differs by layer"]),
        ({"llama.block_count": 3}, {}, ["blk.2.attn_norm.weight is missing"]),
        ({}, {"blk.0.attn_q.bias": np.ones(64, np.float32)}, ["blk.0.attn_q.bias belongs to no Llama"]),
        ({}, {"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)}, ["rope_freqs.weight is not Llama 3's"]),
        ({"tokenizer.ggml.model": "bert"}, {}, ["tokenizer.ggml.model='bert'", "gpt2"]),
        ({"tokenizer.ggml.tokens": None}, {}, ["tokens or token_type are missing"]),
        ({"tokenizer.ggml.pre": "qwen35"}, {}, ["tokenizer.ggml.pre='qwen35'", "smollm", "llama-bpe"]),
        ({"tokenizer.ggml.merges": None}, {}, ["merges is missing"]),
        ({"tokenizer.ggml.model": "llama"}, {}, ["scores is missing"]),
    ],
)  # fmt: skip
def test_refusals(metadata: dict[str, Any], tensors: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    file = llamas.save_gguf(llamas.llama(), tmp_path / "model.gguf", metadata=metadata, tensors=tensors)
    with pytest.raises(NLDError) as caught:
        converted(file)
    assert str(caught.value).startswith(f"SOURCE={file}: ")
    for word in words:
        assert word in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_quantization_that_the_library_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = llamas.save_gguf(llamas.llama(), tmp_path / "model.gguf", "Q8_0")
    monkeypatch.delitem(gguf.quants._type_traits, gguf.GGMLQuantizationType.Q8_0)
    with pytest.raises(NLDError, match=r"is quantized to Q8_0, which .* cannot read; allowed: F32"):
        converted(file)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no GGUF at all, though long enough for a header" * 10])
def test_files_that_are_no_gguf(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(NLDError, match="not a GGUF file that can be read"):
        open_source(tmp_path / "model.gguf")


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(NLDError, match=r"needs the package gguf \(pip install 'vllm-nld\[gguf\]'\)"):
        GGUFSource(tmp_path / "model.gguf")
