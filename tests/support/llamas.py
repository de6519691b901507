"""Tiny random models of the Llama family as others publish them: Hugging Face folders and GGUF files."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = (Path(__file__).read_text() + (Path(__file__).parent / "models.py").read_text()).splitlines()
SPECIAL = ["<s>", "</s>", "<unk>", "<|user|>", "<|reserved_0|>", "<|rare|>"]
TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}</s>{% endfor %}"
BEGIN, END, UNKNOWN, RESERVED, RARE = 0, 1, 2, 4, 5


@cache
def tokenizer(splitter: str = "gpt-2", special: tuple[str, ...] = tuple(SPECIAL)) -> Tokenizer:
    """Byte pairs learnt from this repository, 320 tokens, the special ones first."""
    made = Tokenizer(models.BPE())
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    made.pre_tokenizer = {"gpt-2": gpt2, "smollm": digits}[splitter]
    made.decoder = decoders.ByteLevel()
    added = [AddedToken(text, special=True, normalized=False) for text in special]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=320, special_tokens=added, initial_alphabet=alphabet, show_progress=False)
    )
    return made


def llama(kind: str = "llama", seed: int = 0, **overrides: Any) -> Any:
    """transformers' model with weights large enough that attention matters."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": None, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }  # fmt: skip
    classes = {"llama": (LlamaConfig, LlamaForCausalLM), "mistral": (MistralConfig, MistralForCausalLM)}
    config, model = classes[kind]
    if kind == "mistral":
        settings["sliding_window"] = None
    torch.manual_seed(seed)
    made = model(config(**(settings | overrides))).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.5 if "embed" in name else 1.6 * parameter.shape[1] ** -0.5)
            else:
                parameter.uniform_(0.5, 1.5)
    return made


def save_folder(model: Any, folder: Path, made: Tokenizer | None = None, **settings: Any) -> Path:
    """Write a Hugging Face folder; ``settings`` are for ``config.json``, over what the model says."""
    model.save_pretrained(folder)
    (made or tokenizer()).save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    if settings:
        raw = json.loads((folder / "config.json").read_text())
        write_json(folder / "config.json", raw | settings)
    return folder


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content))


def pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder a projection's rows as llama.cpp's converter does: rotary halves become neighbors."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_tensors(model: Any) -> dict[str, np.ndarray]:
    """Return a model's weights as a GGUF file names and orders them, float32."""
    config = model.config
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    found = {}
    for name, parameter in model.named_parameters():
        stem, data = name.removesuffix(".weight"), parameter.detach().float().numpy()
        if stem in top:
            found[f"{top[stem]}.weight"] = data
            continue
        layer, _, part = stem.removeprefix("model.layers.").partition(".")
        heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
        found[f"blk.{layer}.{NAMES[part]}.weight"] = pairs(data, heads[part]) if part in heads else data
    return found


def save_gguf(
    model: Any,
    file: Path,
    quantization: str = "F32",
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    splitter: str = "gpt-2",
) -> Path:
    """Write a GGUF file by the library's own writer.

    ``metadata`` are added or changed (None leaves one out), ``tensors`` added. Matrices are quantized, norms are not.
    """
    import gguf

    config = model.config
    made = tokenizer(splitter)
    vocabulary = sorted(made.get_vocab().items(), key=lambda item: item[1])
    values: dict[str, Any] = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.attention.key_length": config.head_dim,
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "llama.rope.dimension_count": config.head_dim,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": splitter,
        "tokenizer.ggml.tokens": [text for text, _ in vocabulary],
        "tokenizer.ggml.token_type": [3 if text in SPECIAL else 1 for text, _ in vocabulary],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in json.loads(made.to_str())["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": BEGIN,
        "tokenizer.ggml.eos_token_id": END,
        "tokenizer.ggml.unknown_token_id": UNKNOWN,
        "tokenizer.chat_template": TEMPLATE,
    } | (metadata or {})
    writer = gguf.GGUFWriter(file, values.pop("general.architecture", "llama"))
    for key, value in values.items():
        if value is not None:
            add_value(writer, key, value)
    kind = gguf.GGMLQuantizationType[quantization]
    for name, data in (gguf_tensors(model) | (tensors or {})).items():
        if data.ndim == 1:
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add_value(writer: Any, key: str, value: Any) -> None:
    """Add metadata under GGUF's type for it."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)
