"""A GGUF file, llama.cpp's format, as a source. It is read with the library ``gguf`` by llama.cpp's authors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vllm_nld.checkpoints.headers import expected_tensors
from vllm_nld.conversion import gguf_tokenizer, rope
from vllm_nld.conversion.gguf_network import GGUFNetwork
from vllm_nld.conversion.source import Source
from vllm_nld.errors import NLDError, shown

_TOP = {"encoder.embed_tokens": "token_embd", "encoder.norm": "output_norm", "diffusion_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_DIVISORS = "rope_freqs.weight"
_PLAIN_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GGUFSource(Source):
    """A ``.gguf`` file of the architecture ``llama``: weights, sizes and tokenizer in one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reader = _reader(path)
        self._check_architecture()
        self.raw = {tensor.name: tensor for tensor in self.reader.tensors}
        self.settings = self._settings()
        self._check_tensors()
        weights = self.raw["blk.0.attn_q.weight"].tensor_type.name
        self.dtype = _PLAIN_TYPES.get(weights, torch.bfloat16)
        self.tokenizer = gguf_tokenizer.rebuild(path, self.value)
        self.vocabulary = gguf_tokenizer.vocabulary(self.value)

    def value(self, key: str, default: Any = None) -> Any:
        """Return a metadata value, or the default."""
        field = self.reader.fields.get(key)
        return default if field is None else field.contents()

    def size(self, key: str, default: Any = None) -> Any:
        """Return metadata of the architecture.

        Raises:
            NLDError: there is none, and no default.
        """
        value = self.value(f"llama.{key}", default)
        if value is None:
            raise NLDError(f"SOURCE={self.path}: the metadata llama.{key} is missing")
        if isinstance(value, list):
            raise NLDError(f"SOURCE={self.path}: llama.{key} differs by layer; allowed: one value for all")
        return value

    def tensor(self, name: str) -> Tensor:
        data = self.dequantized(_their_name(name))
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if f".self_attn.{part}." in name:
                data = _halves(data, self.settings[heads])
        return data

    def dequantized(self, name: str) -> Tensor:
        """Return a tensor by its name in the file, float32.

        Raises:
            NLDError: the library cannot read the type it is quantized to.
        """
        from gguf import dequantize

        tensor = self.raw[name]
        try:
            data = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise NLDError(
                f"SOURCE={self.path}: {name} is quantized to {tensor.tensor_type.name}, which the installed gguf "
                "library cannot read; allowed: F32, F16, BF16, Q8_0, Q4_0 to Q5_1, the K types, and what else it reads"
            ) from None
        return torch.from_numpy(np.array(data, dtype=np.float32))

    def write_tokenizer(self, folder: Path) -> None:
        gguf_tokenizer.write(self.tokenizer, self.value, self.settings, folder)

    def network(self) -> nn.Module:
        tensors = {name: self.dequantized(name) for name in self.raw if name != _DIVISORS}
        return GGUFNetwork(self.config(mask_token_id=0), tensors, self._divisors(), self._linear_factor())

    def _check_architecture(self) -> None:
        found = self.value("general.architecture")
        if found != "llama":
            raise NLDError(f"SOURCE={self.path}: general.architecture={shown(found)}; allowed: llama")
        shards = self.value("split.count", 1)
        if shards > 1:
            raise NLDError(f"SOURCE={self.path}: one of {shards} files; allowed: one file (llama-gguf-split --merge)")
        experts = self.value("llama.expert_count", 0)
        if experts:
            raise NLDError(f"SOURCE={self.path}: llama.expert_count={experts}; allowed: none, NLD has one MLP a layer")

    def _divisors(self) -> Tensor | None:
        return self.dequantized(_DIVISORS) if _DIVISORS in self.raw else None

    def _linear_factor(self) -> float:
        scaled = self.value("llama.rope.scaling.type", "none") == "linear"
        return float(self.value("llama.rope.scaling.factor", 1.0)) if scaled else 1.0

    def _settings(self) -> dict[str, Any]:
        hidden, heads = self.size("embedding_length"), self.size("attention.head_count")
        head_dim = self.size("attention.key_length", hidden // heads)
        positions, window = self.size("context_length"), self.value("llama.attention.sliding_window", 0)
        if 0 < window < positions:
            raise NLDError(f"SOURCE={self.path}: llama.attention.sliding_window={window} is in use; allowed: none")
        for key in ("rope.dimension_count", "attention.value_length"):
            if self.size(key, head_dim) != head_dim:
                raise NLDError(f"SOURCE={self.path}: llama.{key}={self.size(key)}; allowed: the head size, {head_dim}")
        theta = _shortest(self.size("rope.freq_base", 10_000.0))
        kind = self.value("llama.rope.scaling.type", "none")
        parameters = rope.of_gguf(self.path, head_dim, theta, kind, self._linear_factor(), self._divisors())
        embedding = self.raw.get("token_embd.weight")
        return {
            "vocab_size": int(embedding.shape[1]) if embedding is not None else self.size("vocab_size"),
            "hidden_size": hidden,
            "intermediate_size": self.size("feed_forward_length"),
            "num_hidden_layers": self.size("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.size("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": positions,
            "rms_norm_eps": _shortest(self.size("attention.layer_norm_rms_epsilon")),
            "tie_word_embeddings": "output.weight" not in self.raw,
            "rope_parameters": parameters,
            "bos_token_id": self.value("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.value("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.value("tokenizer.ggml.padding_token_id"),
        }

    def _check_tensors(self) -> None:
        expected = {_their_name(name): shape for name, shape in expected_tensors(self.config(mask_token_id=0)).items()}
        found = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self.raw.items()}
        self.compare_shapes(found, expected, "metadata asks for", {_DIVISORS})


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise NLDError(f"SOURCE={path}: reading GGUF needs the package gguf (pip install 'vllm-nld[gguf]')") from None
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, OSError, KeyError) as error:
        raise NLDError(f"SOURCE={path}: not a GGUF file that can be read: {' '.join(str(error).split())}") from None


def _their_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in _TOP:
        return f"{_TOP[stem]}.weight"
    layer, _, part = stem.removeprefix("encoder.layers.").partition(".")
    return f"blk.{layer}.{_LAYER[part]}.weight"


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Reorder each head's rows: llama.cpp rotates rows (2i, 2i + 1) together, NLD (i, i + head_dim / 2)."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _shortest(value: float) -> float:
    """Return the shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
