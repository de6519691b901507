"""Random NLD checkpoints for tests: every shape the released configs use, at a size that runs in milliseconds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.checkpoints.draft_lora import FOLDER
from vllm_nld.checkpoints.headers import expected_image_tensors
from vllm_nld.config import NemotronLabsDiffusionConfig, NemotronLabsDiffusionVLMConfig
from vllm_nld.reference import ReferenceModel


def yarn(factor: float = 4.0, original: int = 64, theta: float = 1e4, beta: float = 0.1) -> dict[str, Any]:
    """YaRN parameters in the released layout, with an original context so short that a test can exceed it."""
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": beta,
    }


def small_config(**overrides: Any) -> NemotronLabsDiffusionConfig:
    """A two-layer model with a vocabulary so small that random drafts are sometimes accepted."""
    settings: dict[str, Any] = {
        "architectures": ["NemotronLabsDiffusionModel"],
        "vocab_size": 24,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "rope_parameters": yarn(),
        "block_size": 8,
        "mask_token_id": 5,
        "bos_token_id": 1,
        "eos_token_id": None,
        "dtype": "float32",
    }
    return NemotronLabsDiffusionConfig(**(settings | overrides))


def random_model(config: NemotronLabsDiffusionConfig, seed: int = 0) -> ReferenceModel:
    """Weights large enough that attention matters and the greedy text does not settle at once."""
    torch.manual_seed(seed)
    model = ReferenceModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                std = 1.0 if "embed_tokens" in name else 1.6 * parameter.shape[1] ** -0.5
                parameter.normal_(std=std)
            else:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def save(model: ReferenceModel, folder: Path) -> Path:
    """Write config and weights in the released layout."""
    folder.mkdir(parents=True, exist_ok=True)
    # Parameters, not the state dict: that has tied weights twice.
    save_file({k: v.detach().contiguous() for k, v in model.named_parameters()}, folder / "model.safetensors")
    model.config.save_pretrained(folder)
    return folder


def save_first_layers(folder: Path, layers: int = 2) -> Path:
    """Write the embedded checkpoint with its first layers only, and with its tokenizer, adapter and learned sampler.

    For tests that need its vocabulary but not good text: an engine takes a third of the time for a token.
    """
    shutil.copytree(checkpoint_path("tiny"), folder)
    config = json.loads((folder / "config.json").read_text())
    dropped = tuple(f"encoder.layers.{layer}." for layer in range(layers, config["num_hidden_layers"]))
    for file in (folder / "model.safetensors", folder / FOLDER / "adapter_model.safetensors"):
        kept = {name: x for name, x in load_file(file).items() if not any(layer in name for layer in dropped)}
        save_file(kept, file)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    return folder


def small_vlm_config(**overrides: Any) -> NemotronLabsDiffusionVLMConfig:
    """The text model of :func:`small_config`, with a two-layer tower for images of at most 8 by 8 cells."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 224,
    }
    text = small_config(architectures=["NemotronLabsDiffusionVLMModel"]).to_dict()
    return NemotronLabsDiffusionVLMConfig(**(text | {"vision_config": vision} | overrides))


def save_vlm(config: NemotronLabsDiffusionVLMConfig, folder: Path, seed: int = 0) -> Path:
    """Write a random model that reads images, in the released layout; pictures change its text."""
    save(random_model(config.text_config, seed), folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    for name, shape in expected_image_tensors(config).items():
        random = torch.randn(shape, generator=generator)
        fan_in = random[0].numel()
        tensors[name] = 1 + 0.2 * random if len(shape) == 1 else 1.6 * fan_in**-0.5 * random
    save_file(tensors, folder / "model.safetensors")
    config.save_pretrained(folder)
    return folder


CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}{{ message.content }}{%- else -%}
{%- for part in message.content -%}
{%- if part.type in ('image', 'image_url') -%}{{ '<|image_start|>' }}{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n<think></think>' }}{%- endif -%}
"""
"""Takes both kinds of parts that stand for an image, and plain text."""


def save_chatting_vlm(folder: Path) -> Path:
    """Write a random model that reads images, with the embedded tiny model's tokenizer and a chat template.

    The tokenizer's ids 3 to 6, which have no meaning, become the tokens of images.
    """
    names = ["<|image_start|>", "<|image_pad|>", "<|image_break|>", "<|image_end|>"]
    tiny = json.loads((checkpoint_path("tiny") / "config.json").read_text())
    special = {key: tiny[key] for key in ("vocab_size", "mask_token_id", "eos_token_id", "bos_token_id")}
    ids = {f"image_{part}_token_id": 3 + place for place, part in enumerate(("start", "pad", "break", "end"))}
    save_vlm(small_vlm_config(**special, **ids), folder)
    tokenizer = (checkpoint_path("tiny") / "tokenizer.json").read_text()
    for place, name in enumerate(names):
        tokenizer = tokenizer.replace(f"<special_{3 + place}>", name)
    (folder / "tokenizer.json").write_text(tokenizer)
    shutil.copy(checkpoint_path("tiny") / "tokenizer_config.json", folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder
