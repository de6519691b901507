"""Write a trained model as a Hugging Face folder with the released tensor names and config keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import corpus
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from vllm_nld.reference.model import ReferenceModel

CHAT_TEMPLATE = """\
{%- set thinking = enable_thinking | default(false) -%}
{%- if messages[0].role != 'system' -%}{{ '<|im_start|>system\\n<|im_end|>\\n' }}{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' + ('<think>\\n' if thinking else '<think></think>') }}
{%- endif -%}
"""


SPECIAL_TOKENS = ("<mask>", "<think>", "</think>", "<|im_start|>")


def rope_parameters() -> dict[str, Any]:
    """Return the embedded checkpoints' rotary parameters: every released feature, for 4 x 512 positions."""
    return {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    }


def export(
    model: ReferenceModel,
    tokenizer: Tokenizer,
    folder: Path,
    chat_template: str = CHAT_TEMPLATE,
    special_tokens: tuple[str, ...] = SPECIAL_TOKENS,
) -> None:
    """Write config, weights (bfloat16), tokenizer and chat template to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(torch.bfloat16).cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "<|im_end|>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "additional_special_tokens": list(special_tokens),
            "model_max_length": model.config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        },
    )
    (folder / "chat_template.jinja").write_text(chat_template)
    _write(
        folder / "generation_config.json",
        {"bos_token_id": corpus.BOS_ID, "eos_token_id": corpus.EOS_ID, "pad_token_id": corpus.PAD_ID},
    )


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
