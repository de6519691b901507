"""The draft adapter: a LoRA on ``o_proj`` that is active only while self-speculation drafts.

Released checkpoints contain one in the folder ``linear_spec_lora``, in the layout of PEFT. It makes the bidirectional
pass predict what the causal pass will say. Prefill, verify, AR and diffusion do not use it, so the text is that of the
unchanged weights. A layer adds ``B (A x)`` to its projection instead of keeping a merged second weight. That works with
quantized weights and with per-request LoRAs, and takes 0.4 % more memory at 8B instead of 7 %.

This module finds and checks it. The layers' part is :mod:`vllm_nld.model.draft_adapter`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vllm_nld.checkpoints.headers import Shapes, complain, differences, tensor_shapes
from vllm_nld.config import NemotronLabsDiffusionConfig
from vllm_nld.errors import NLDError

FOLDER = "linear_spec_lora"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
TARGET = "o_proj"


@dataclass(frozen=True)
class DraftLoRA:
    """A checked adapter on disk.

    Attributes:
        folder: where its two files are.
        rank: columns of A, rows of B.
        scale: ``lora_alpha / r``, which multiplies ``B A x``.
    """

    folder: Path
    rank: int
    scale: float

    @classmethod
    def open(cls, folder: Path, config: NemotronLabsDiffusionConfig) -> DraftLoRA:
        """Read an adapter's configuration and compare its tensors' headers with the model's config.

        Raises:
            NLDError: a file or tensor is missing or misshapen, or the adapter uses a feature that is not supported.
        """
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise NLDError(
                    f"draft_lora: {folder} has no {name}; a PEFT folder with {CONFIG_FILE} and {WEIGHTS_FILE} is needed"
                )
        try:
            settings = json.loads((folder / CONFIG_FILE).read_text())
        except json.JSONDecodeError as error:
            raise NLDError(f"draft_lora: {folder / CONFIG_FILE} is not JSON: {error}") from None
        adapter = cls(folder, *_rank_and_scale(settings, folder))
        _check_headers(adapter, config)
        return adapter


def _rank_and_scale(settings: Mapping[str, Any], folder: Path) -> tuple[int, float]:
    where = f"draft_lora: {folder / CONFIG_FILE}"
    for key, allowed in _PLAIN_LORA.items():
        value = settings.get(key)
        if value not in allowed:
            raise NLDError(f"{where}: {key}={value!r} is not supported; allowed: {allowed[0]!r}")
    targets = settings.get("target_modules")
    if targets != TARGET and (
        not isinstance(targets, list) or {str(name).split(".")[-1] for name in targets} != {TARGET}
    ):
        raise NLDError(
            f"{where}: target_modules={targets!r}, but a draft adapter changes only {TARGET}; allowed: [{TARGET!r}]"
        )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or rank <= 0:
        raise NLDError(f"{where}: r={rank!r}, but a positive integer is needed")
    if not isinstance(alpha, (int, float)):
        raise NLDError(f"{where}: lora_alpha={alpha!r}, but a number is needed")
    return rank, alpha / rank


_PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "bias": ("none", None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None, []),
    "fan_in_fan_out": (False, None),
}
"""PEFT's options that would change what ``B A x`` means; all others describe training."""


def tensor_names(layer: int) -> tuple[str, str]:
    """Return the names of a layer's A ``[rank, heads * head_dim]`` and B ``[hidden, rank]``."""
    stem = f"base_model.model.encoder.layers.{layer}.self_attn.{TARGET}"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def _check_headers(adapter: DraftLoRA, config: NemotronLabsDiffusionConfig) -> None:
    queries = config.num_attention_heads * config.head_dim
    expected: Shapes = {}
    for layer in range(config.num_hidden_layers):
        down, up = tensor_names(layer)
        expected |= {down: (adapter.rank, queries), up: (config.hidden_size, adapter.rank)}
    where = f"draft_lora: {adapter.folder / WEIGHTS_FILE}"
    try:
        found = tensor_shapes(adapter.folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise NLDError(f"{where} cannot be read: {error}") from None
    problems = differences(found, expected, f"this model and r={adapter.rank} ask for")
    complain(
        where, problems + [f"{name} belongs to no {TARGET} of this model" for name in found if name not in expected]
    )


def adapter_of(vllm_config: Any) -> DraftLoRA | None:
    """Return the adapter that an engine drafts with, or None.

    ``draft_lora`` is ``"auto"`` (the checkpoint's own, if it has one), ``"off"``, or a folder.

    Raises:
        NLDError: the adapter is not suitable, or the folder does not exist.
    """
    from vllm_nld.names import PROPOSER_PATHS
    from vllm_nld.options import NLDOptions

    speculative = vllm_config.speculative_config
    if speculative is None or speculative.model not in PROPOSER_PATHS:
        return None
    choice, model = NLDOptions.from_vllm_config(vllm_config).draft_lora, vllm_config.model_config
    if choice == "off":
        return None
    if choice != "auto":
        folder = Path(choice)
        if not folder.is_dir():
            raise NLDError(
                f"draft_lora={choice!r} is not a folder; allowed: 'auto', 'off', or the path of a PEFT folder"
            )
    else:
        folder = checkpoint_folder(model.model, model.revision, vllm_config.load_config.download_dir) / FOLDER
        if not folder.is_dir():
            return None
    return DraftLoRA.open(folder, model.hf_config)


@cache
def checkpoint_folder(model: str, revision: str | None, cache_dir: str | None) -> Path:
    """Return the local folder of a checkpoint. If it is on the hub, the adapter's files are fetched first.

    vLLM's own download fetches the weights at the top of a repository, but not its subfolders.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(model, revision=revision, cache_dir=cache_dir, allow_patterns=[f"{FOLDER}/*", "config.json"])
    )
