"""Converting Llama models: the result computes what transformers computes, keeps ties, tokenizer and template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tests.support import llamas
from tests.support.commands import invoke
from vllm_nld.checkpoints.headers import check_tensors
from vllm_nld.config import NemotronLabsDiffusionConfig
from vllm_nld.conversion import Options, convert, open_source
from vllm_nld.conversion.checkpoint import Result, shards_of
from vllm_nld.errors import NLDError
from vllm_nld.reference import ar_generate, linear_spec_generate, load_reference

LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
    "attention_factor": 1.0,
}  # fmt: skip
IDS = torch.randint(6, 320, (200,), generator=torch.Generator().manual_seed(3))


def converted(source: Path, folder: Path, **options: Any) -> Result:
    return convert(open_source(source), folder, Options(**options))


def logits_of(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids[None]).logits[0]


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False, "rope_parameters": LINEAR}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 32, "rope_parameters": LLAMA3}),
        ("llama", {"num_key_value_heads": 4, "rope_parameters": YARN}),
        ("mistral", {"tie_word_embeddings": False, "head_dim": 8, "rms_norm_eps": 1e-3}),
        ("mistral", {"sliding_window": 256}),
    ],
)
def test_logits_equal_transformers(kind: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    model = llamas.llama(kind, **overrides)
    result = converted(llamas.save_folder(model, tmp_path / "source"), tmp_path / "nld")
    config = NemotronLabsDiffusionConfig.from_pretrained(tmp_path / "nld")
    found = load_reference(tmp_path / "nld").causal(IDS[None])[0]
    expected = logits_of(model)
    others = torch.arange(320) != llamas.RESERVED
    torch.testing.assert_close(found[:, others], expected[:, others], atol=2e-4, rtol=0)
    assert (found[:, ~others] == -torch.inf).all()
    assert config.mask_token_id == llamas.RESERVED
    assert config.tie_word_embeddings == model.config.tie_word_embeddings
    assert result.agreement is not None
    assert result.agreement.difference < 2e-4
    assert result.agreement.largest > 5
    assert result.agreement.rounding == 0
    assert result.agreement.same_best == result.agreement.positions > 200
    check_tensors(tmp_path / "nld", config)


def test_the_check_would_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that arrives a little wrong: refused, and nothing is left behind."""
    from vllm_nld.conversion.huggingface import HuggingFaceSource

    source = open_source(llamas.save_folder(llamas.llama(), tmp_path / "source"))
    original = HuggingFaceSource.tensor

    def tensor(self: Any, name: str) -> torch.Tensor:
        found = original(self, name)
        return found.roll(1, 0) if name == "encoder.layers.1.self_attn.k_proj.weight" else found

    monkeypatch.setattr(HuggingFaceSource, "tensor", tensor)
    with pytest.raises(NLDError, match=r"logits differ by up to .* nothing was written"):
        convert(source, tmp_path / "nld", Options())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_tied_embeddings_stay_one_tensor_and_the_text_is_transformers(tmp_path: Path) -> None:
    """AR, self-speculation and transformers' greedy search, token for token."""
    model = llamas.llama(seed=4)
    result = converted(llamas.save_folder(model, tmp_path / "source"), tmp_path / "nld")
    tensors = load_file(tmp_path / "nld" / "model.safetensors")
    assert "diffusion_head.weight" not in tensors
    assert result.parameters == sum(tensor.numel() for tensor in tensors.values())
    prompt = IDS[:9].tolist()
    generated = model.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, suppress_tokens=[llamas.RESERVED]
    )[0].tolist()
    reference = load_reference(tmp_path / "nld")
    assert ar_generate(reference, prompt, 40).ids == generated
    assert linear_spec_generate(reference, prompt, 40).ids == generated


def test_tokenizer_template_and_generation_defaults_are_carried_over(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = llamas.save_folder(llamas.llama(), tmp_path / "source")
    llamas.write_json(source / "generation_config.json", {"eos_token_id": [1, 3], "temperature": 0.7})
    (source / "LICENSE").write_text("Yours.\n")
    converted(source, tmp_path / "nld")
    before, after = (AutoTokenizer.from_pretrained(str(path)) for path in (source, tmp_path / "nld"))
    chat = [{"role": "user", "content": "Is 12 > 3?"}]
    assert after.apply_chat_template(chat, tokenize=False) == "<|user|>Is 12 > 3?</s>"
    assert after.encode("def f(x): return 12") == before.encode("def f(x): return 12")
    for name in ("generation_config.json", "LICENSE", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "nld" / name).read_bytes() == (source / name).read_bytes(), name


def test_a_tokenizer_whose_class_is_nowhere_named(tmp_path: Path) -> None:
    """transformers knows Llama's by the model type, and none for NLD's."""
    from transformers import AutoTokenizer

    source = llamas.save_folder(llamas.llama(), tmp_path / "source")
    (source / "tokenizer_config.json").unlink()
    converted(source, tmp_path / "nld")
    ids = Tokenizer.from_file(str(source / "tokenizer.json")).encode("return x").ids
    assert AutoTokenizer.from_pretrained(str(tmp_path / "nld")).encode("return x") == ids


@pytest.mark.parametrize(("dtype", "bytes"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_dtype(dtype: str, bytes: int, tmp_path: Path) -> None:
    """Both sides are rounded before they are compared, and what rounding changes is said."""
    source = llamas.save_folder(llamas.llama(), tmp_path / "source")
    result = converted(source, tmp_path / "nld", dtype=dtype, block_length=8)
    tensors = load_file(tmp_path / "nld" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype}"}
    assert result.bytes == bytes * result.parameters
    config = json.loads((tmp_path / "nld" / "config.json").read_text())
    assert (config["dtype"], config["block_size"]) == (dtype, 8)
    assert result.agreement is not None
    assert result.agreement.difference < 2e-4
    assert (result.agreement.rounding > 1e-3) == (bytes == 2)
    report = json.loads((tmp_path / "nld" / "conversion.json").read_text())
    assert report["agreement"]["rounding"] == result.agreement.rounding


def test_the_sources_dtype_is_the_default(tmp_path: Path) -> None:
    result = converted(llamas.save_folder(llamas.llama().bfloat16(), tmp_path / "source"), tmp_path / "nld")
    assert result.dtype == "bfloat16"
    assert result.agreement is not None
    assert result.agreement.rounding == 0


def test_several_files_in_and_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_nld.conversion import checkpoint as module

    shapes = {"a": (10, 10), "b": (30, 10), "c": (5,), "d": (20, 10)}
    assert shards_of(shapes, itemsize=2, limit=450) == [["a"], ["b"], ["c", "d"]]
    model = llamas.llama()
    source = llamas.save_folder(model, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    save_file({"model.norm.weight": tensors.pop("model.norm.weight")}, source / "more.safetensors", {"format": "pt"})
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(module, "SHARD_BYTES", 60_000)
    convert(open_source(source), tmp_path / "nld", Options(check=False))
    index = json.loads((tmp_path / "nld" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "nld").glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    found = load_reference(tmp_path / "nld").causal(IDS[None])[0]
    torch.testing.assert_close(found[:, 6:], logits_of(model)[:, 6:], atol=2e-4, rtol=0)


def test_a_head_beside_tied_embeddings_and_old_frequencies_are_left_out(tmp_path: Path) -> None:
    source = llamas.save_folder(llamas.llama(), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    converted(source, tmp_path / "nld")
    assert "diffusion_head.weight" not in load_file(tmp_path / "nld" / "model.safetensors")


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command(as_json: bool, tmp_path: Path) -> None:

    source = llamas.save_folder(llamas.llama(), tmp_path / "source")
    words = ["convert", str(source), str(tmp_path / "nld"), "--dtype", "bfloat16", *["--json"] * as_json]
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    if as_json:
        report = json.loads(result.stdout)
        assert report == json.loads((tmp_path / "nld" / "conversion.json").read_text())
        return
    assert "embeddings tied" in result.stdout
    assert f"mask token {llamas.RESERVED} (<|reserved_0|>)" in result.stdout
    assert "logits equal the source's within" in result.stdout
    assert "rounding to bfloat16 changes logits" in result.stdout
    assert Tokenizer.from_file(str(tmp_path / "nld" / "tokenizer.json")).token_to_id("<|user|>") == 3
