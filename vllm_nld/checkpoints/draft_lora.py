"""The draft adapter: a LoRA on some of the layers' projections that is active only while self-speculation drafts.

Released checkpoints contain one on ``o_proj`` in the folder ``linear_spec_lora``, in the layout of PEFT. An adapter can
change any other projections, and have an input row of its own for the mask token. It makes the bidirectional pass
predict what the causal pass will say. Prefill, verify, AR and diffusion do not use it, so the text is that of the
unchanged weights. A layer adds ``B (A x)`` to its projection instead of keeping a merged second weight. That works with
quantized weights and with per-request LoRAs, and takes 0.4 % more memory at 8B (``o_proj``, rank 128) instead of 7 %.

This module finds and checks it. The layers' part is :mod:`vllm_nld.model.draft_adapter`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vllm_nld.checkpoints.headers import Shapes, complain, differences, expected_tensors, tensor_shapes
from vllm_nld.config import NemotronLabsDiffusionConfig
from vllm_nld.errors import NLDError, shown

FOLDER = "linear_spec_lora"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MODULES = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
"""The projections that an adapter may change, and where a layer has them."""

TARGETS = tuple(MODULES)
RELEASED_TARGETS = ("o_proj",)
MASK_ROW = "base_model.model.encoder.embed_tokens.token_adapter.trainable_tokens_delta"
"""The tensor ``[1, hidden]`` that replaces the mask token's input row; PEFT calls it a delta, but it is the row."""


@dataclass(frozen=True)
class DraftLoRA:
    """A checked adapter on disk.

    Attributes:
        folder: where its two files are.
        rank: rows of A, columns of B.
        scale: ``lora_alpha / r``, which multiplies ``B A x``.
        targets: the projections that it changes, in the order of :data:`TARGETS`.
        mask_row: whether it has an input row for the mask token.
    """

    folder: Path
    rank: int
    scale: float
    targets: tuple[str, ...] = RELEASED_TARGETS
    mask_row: bool = False

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
        where = f"draft_lora: {folder / CONFIG_FILE}"
        if not isinstance(settings, dict):
            raise NLDError(f"{where}: {shown(settings)} is no JSON object, but PEFT's settings are needed")
        _check_plain(settings, where)
        targets, mask_row = _targets(settings, where), _has_mask_row(settings, config.mask_token_id, where)
        adapter = cls(folder, *_rank_and_scale(settings, where), targets, mask_row)
        _check_headers(adapter, config)
        return adapter


def _check_plain(settings: Mapping[str, Any], where: str) -> None:
    for key, allowed in _PLAIN_LORA.items():
        value = settings.get(key)
        if value not in allowed:
            raise NLDError(f"{where}: {key}={value!r} is not supported; allowed: {allowed[0]!r}")


def _targets(settings: Mapping[str, Any], where: str) -> tuple[str, ...]:
    targets = settings.get("target_modules")
    names = [targets] if isinstance(targets, str) else targets
    found = {str(name).split(".")[-1] for name in names} if isinstance(names, list) else set()
    if not found or not found <= set(TARGETS):
        raise NLDError(
            f"{where}: target_modules={shown(targets)}, but a draft adapter changes the layers' projections; "
            f"allowed: one or more of {', '.join(TARGETS)}"
        )
    return in_order(found)


def in_order(targets: Iterable[str]) -> tuple[str, ...]:
    """Return projections in the order of :data:`TARGETS`, each once."""
    chosen = set(targets)
    return tuple(target for target in TARGETS if target in chosen)


def _has_mask_row(settings: Mapping[str, Any], mask_token_id: int, where: str) -> bool:
    tokens = settings.get("trainable_token_indices")
    if not tokens:
        return False
    if tokens not in ([mask_token_id], {"embed_tokens": [mask_token_id]}):
        raise NLDError(
            f"{where}: trainable_token_indices={shown(tokens)}, but only the mask token may have an input row of its "
            f"own; allowed: None, [{mask_token_id}] or {{'embed_tokens': [{mask_token_id}]}}"
        )
    return True


def _rank_and_scale(settings: Mapping[str, Any], where: str) -> tuple[int, float]:
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


def tensor_names(layer: int, target: str) -> tuple[str, str]:
    """Return the names of a projection's A ``[rank, inputs]`` and B ``[outputs, rank]``."""
    stem = f"base_model.model.encoder.layers.{layer}.{MODULES[target]}"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def projection_size(config: NemotronLabsDiffusionConfig, target: str) -> tuple[int, int]:
    """Return the inputs and the outputs of a projection."""
    outputs, inputs = expected_tensors(config)[f"encoder.layers.0.{MODULES[target]}.weight"]
    return inputs, outputs


def _check_headers(adapter: DraftLoRA, config: NemotronLabsDiffusionConfig) -> None:
    expected: Shapes = {MASK_ROW: (1, config.hidden_size)} if adapter.mask_row else {}
    for target in adapter.targets:
        inputs, outputs = projection_size(config, target)
        for layer in range(config.num_hidden_layers):
            down, up = tensor_names(layer, target)
            expected |= {down: (adapter.rank, inputs), up: (outputs, adapter.rank)}
    where = f"draft_lora: {adapter.folder / WEIGHTS_FILE}"
    try:
        found = tensor_shapes(adapter.folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise NLDError(f"{where} cannot be read: {error}") from None
    problems = differences(found, expected, f"this model and r={adapter.rank} ask for")
    asked = " or ".join(adapter.targets)
    complain(
        where, problems + [f"{name} belongs to no {asked} of this model" for name in found if name not in expected]
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
