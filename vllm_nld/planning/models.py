"""The released NLD models: their sizes, how many of their drafts are accepted, and published speeds.

Every figure names its source. "Paper": the models' technical report and cards. "SGLang study": the public repository
linyewei526/Nemotron-Labs-Diffusion, forward times and serving runs on one B200. All with the released draft LoRA,
unless stated otherwise.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.errors import NLDError
from vllm_nld.planning.cost_model import ModelShape


@dataclass(frozen=True)
class Yields:
    """Published yields of a mode's forwards.

    Attributes:
        acceptance: acceptance length at the checkpoint's block length.
        diffusion_tpf: tokens per forward of block diffusion at threshold 0.9, with commits.
    """

    acceptance: float
    acceptance_source: str
    diffusion_tpf: float
    diffusion_source: str


@dataclass(frozen=True)
class PlannedModel:
    """A model to plan for.

    Attributes:
        yields: None where none are published.
        quantization: ``quantization_config`` of its ``config.json``, if there is one.
    """

    name: str
    shape: ModelShape
    yields: Yields | None
    quantization: dict[str, Any] | None = None


RELEASED = {
    "3b": PlannedModel(
        "3b",
        ModelShape(131072, 3072, 9216, 26, 32, 8, 128, 32, 262144),
        Yields(8.72, "paper, TPF 4.36 x 2 forwards", 1.91, "paper"),
    ),
    "8b": PlannedModel(
        "8b",
        ModelShape(131072, 4096, 14336, 34, 32, 8, 128, 32, 262144),
        Yields(11.98, "paper, TPF 5.99 x 2 forwards; on SPEED-Bench 6.82", 2.57, "paper"),
    ),
    "14b": PlannedModel(
        "14b",
        ModelShape(131072, 5120, 16384, 40, 32, 8, 128, 32, 262144),
        Yields(12.24, "SGLang study, mean of nine sets, TPF 6.12 x 2 forwards", 2.57, "none published: the 8B's"),
    ),
}

VLM = PlannedModel(
    "vlm-8b",
    ModelShape(131073, 4096, 14336, 34, 32, 8, 128, 32, 262144, image_weights=428_472_320),
    Yields(7.26, "paper, table 9, TPF 3.63 x 2 forwards, mean of image benchmarks", 2.46, "paper, table 9"),
)
"""The one that reads images, known by its folder or Hugging Face id."""

TINY_YIELDS = Yields(3.42, "benchmarks/results", 1.28, "benchmarks/results")


def find_model(name: str) -> PlannedModel:
    """Return a model by name (3b, 8b, 14b, tiny), checkpoint folder, or Hugging Face id.

    A checkpoint with the sizes of a released model gets its published yields.

    Raises:
        NLDError: it is none of these, or its config cannot be reached or is not an NLD config.
    """
    if name in RELEASED:
        return RELEASED[name]
    if name == "tiny":
        return PlannedModel(name, _read(name, checkpoint_path(name) / "config.json")[0], TINY_YIELDS)
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise NLDError(f"MODEL={name}: no config.json there; allowed: a checkpoint folder, {_names()}")
        shape, quantization = _read(name, folder / "config.json")
    else:
        shape, quantization = _read(name, _download(name))
    same = (model.yields for model in (*RELEASED.values(), VLM) if model.shape.parameters == shape.parameters)
    return PlannedModel(name, shape, next(same, None), quantization)


def _names() -> str:
    return ", ".join((*RELEASED, "tiny"))


def _download(name: str) -> Path:
    """Return the local copy of a Hugging Face repository's config."""
    hint = f"allowed: a checkpoint folder, {_names()}, or a Hugging Face id whose config.json can be reached"
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise NLDError(f"MODEL={name}: no such folder; {hint}")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json", etag_timeout=5))
    except Exception as error:  # network, repository, token, cache: in any case the config cannot be reached
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NLDError(f"MODEL={name}: config.json cannot be reached ({reason}); {hint}") from None


def _read(name: str, path: Path) -> tuple[ModelShape, dict[str, Any] | None]:
    """Return the sizes in a config, and its ``quantization_config``."""
    from vllm_nld.checkpoints.headers import expected_image_tensors
    from vllm_nld.config import NemotronLabsDiffusionConfig, NemotronLabsDiffusionVLMConfig
    from vllm_nld.names import MODEL_TYPES

    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kinds = dict(zip(MODEL_TYPES, (NemotronLabsDiffusionConfig, NemotronLabsDiffusionVLMConfig), strict=True))
        if raw.get("model_type") not in kinds:
            raise ValueError(f"model_type={raw.get('model_type')!r}; allowed: {', '.join(map(repr, kinds))}")
        config = kinds[raw["model_type"]](**raw)
    except (OSError, ValueError, AttributeError) as error:
        raise NLDError(f"MODEL={name}: {path} is not the config of an NLD model: {error}") from None
    shape = ModelShape(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        block_size=config.block_size,
        max_positions=config.position_limit,
        tied=bool(config.tie_word_embeddings),
        image_weights=sum(map(math.prod, expected_image_tensors(config).values()))
        if isinstance(config, NemotronLabsDiffusionVLMConfig)
        else 0,
    )
    quantization = raw.get("quantization_config")
    return shape, quantization if isinstance(quantization, dict) else None


@dataclass(frozen=True)
class Published:
    """A published speed.

    Attributes:
        quantity: ``forward ms`` of one forward over blocks, ``tokens/s`` of one request or ``total tokens/s`` of all.
        mode: as :class:`vllm_nld.planning.cost_model.PlannedMode` names it.
        yields: acceptance length of that run; 0 if it does not matter.
        context: cached tokens per request; a guess where it was not published, which hardly matters.
    """

    model: str
    gpu: str
    mode: str
    block: int
    concurrency: int
    quantity: str
    value: float
    source: str
    yields: float = 0.0
    context: int = 600
    dtype: str = "bfloat16"


def _replays(model: str, block: int, milliseconds: dict[int, float]) -> list[Published]:
    return [
        Published(model, "b200", "self_speculation", block, concurrency, "forward ms", value, "SGLang study")
        for concurrency, value in milliseconds.items()
    ]


def _gsm8k(block: int, concurrency: int, tpf: float, each: float) -> Published:
    source = "SGLang study, GSM8K served"
    return Published("14b", "b200", "self_speculation", block, concurrency, "tokens/s", each, source, 2 * tpf)


SPEED_BENCH = 6.82
"""Acceptance length of the 8B on SPEED-Bench."""

PUBLISHED = [
    Published("8b", "gb200", "ar", 1, 1, "tokens/s", 253, "vendor, SGLang"),
    Published("8b", "gb200", "self_speculation", 32, 1, "tokens/s", 850, "vendor, SGLang", SPEED_BENCH),
    Published("8b", "gb200", "self_speculation", 32, 1, "tokens/s", 1015, "vendor, own kernels", SPEED_BENCH),
    Published("8b", "b200", "self_speculation", 32, 1, "tokens/s", 865, "vendor, SPEED-Bench", SPEED_BENCH),
    Published("8b", "rtxpro6000", "self_speculation", 32, 1, "tokens/s", 277, "vendor", SPEED_BENCH, dtype="fp8"),
    Published("8b", "rtxpro6000", "self_speculation", 32, 1, "tokens/s", 525, "vendor", SPEED_BENCH, dtype="w4a16"),
    Published("8b", "spark", "self_speculation", 32, 1, "tokens/s", 77.5, "vendor", SPEED_BENCH, dtype="fp8"),
    Published("8b", "spark", "self_speculation", 32, 1, "tokens/s", 112.5, "vendor", SPEED_BENCH, dtype="w4a16"),
    *_replays("8b", 8, {1: 4.98, 8: 8.56, 32: 11.24, 64: 15.36, 128: 24.27}),
    *_replays("8b", 16, {1: 5.12, 8: 9.37, 32: 14.47, 64: 21.77, 128: 38.42}),
    *_replays("8b", 32, {1: 5.58, 8: 10.74, 32: 20.90, 64: 35.37, 128: 66.22}),
    *_replays("14b", 8, {1: 6.99, 8: 11.25, 32: 14.65, 64: 20.22, 128: 34.46}),
    *_replays("14b", 32, {1: 7.86, 8: 13.66, 32: 29.62, 64: 53.08, 128: 100.29}),
    _gsm8k(32, 1, 6.17, 692),
    _gsm8k(32, 4, 6.28, 358),
    _gsm8k(16, 16, 4.97, 192),
    _gsm8k(16, 32, 4.93, 158),
    _gsm8k(8, 64, 3.24, 107),
    _gsm8k(8, 128, 3.27, 55),
    Published("14b", "h200", "ar", 1, 120, "total tokens/s", 3577, "Uno paper, 1K in, 8K out", context=5000),
    Published("14b", "h200", "self_speculation", 32, 102, "total tokens/s", 2794, "Uno paper; acceptance guessed",
              SPEED_BENCH, context=5000),
    Published("3b", "a100", "ar", 1, 1, "tokens/s", 109, "third party, SGLang"),
    Published("3b", "a100", "self_speculation", 32, 1, "tokens/s", 450, "third party, SGLang; acceptance guessed",
              8.72),
    Published("3b", "l4", "ar", 1, 1, "tokens/s", 27.3, "third party, the released PyTorch code"),
    Published("3b", "l4", "self_speculation", 32, 1, "forward ms", 43.6, "third party, the released PyTorch code"),
]  # fmt: skip
