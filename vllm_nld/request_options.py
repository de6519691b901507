"""What one request asks of this extension, checked when the request is admitted.

The same function serves the API process, where an unsuitable request becomes an HTTP 400, and the worker, where the
options are acted on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_nld import MODEL_TYPE
from vllm_nld.errors import NLDError
from vllm_nld.options import NAMESPACE, NLDOptions, refuse_misplaced

PROPOSER_PATHS = ("vllm_nld.SelfSpeculation", "vllm_nld.proposer.SelfSpeculation")
LEARNED_SAMPLER_FOLDER = "learned_sampler"

MODES_OF_KEY: dict[str, tuple[str, ...]] = {
    "block_length": ("auto", "self_speculation", "diffusion"),
    "draft_threshold": ("auto", "self_speculation"),
    "draft_adapter": ("auto", "self_speculation"),
    "prompt_lookup": ("auto", "self_speculation"),
    "sampled_drafts": ("auto", "self_speculation"),
    "sampler": ("diffusion",),
    "threshold": ("diffusion",),
    "tokens_per_step": ("diffusion",),
    "entropy_budget": ("diffusion",),
    "max_denoising_steps": ("diffusion",),
    "temperature": ("diffusion",),
    "seed_first": ("diffusion",),
}
ENGINE_KEYS = ("draft_lora",)
"""What a request cannot choose: it is settled when the engine loads."""
BOOLEANS = {key for key, field in NLDOptions.model_fields.items() if field.annotation is bool}
SAMPLERS_OF_KEY: dict[str, tuple[str, ...]] = {
    "threshold": ("confidence_threshold", "learned"),
    "tokens_per_step": ("top_k", "left_to_right"),
    "entropy_budget": ("entropy_budget",),
}


@dataclass(frozen=True)
class EngineTraits:
    """What an engine offers to requests.

    Attributes:
        defaults: its own options.
        block_length: tokens of the longest block, seed included; None without ``--speculative-config``.
        learned_sampler: the folder of the checkpoint's learned sampler, if it brings one.
    """

    defaults: NLDOptions
    block_length: int | None
    learned_sampler: Path | None = None

    @classmethod
    def of(cls, vllm_config: Any) -> EngineTraits:
        """Read them from vLLM's config.

        Raises:
            NLDError: the engine's own options are unsuitable.
        """
        speculative = vllm_config.speculative_config
        own = speculative is not None and speculative.model in PROPOSER_PATHS
        folder = Path(vllm_config.model_config.model) / LEARNED_SAMPLER_FOLDER
        return cls(
            NLDOptions.from_vllm_config(vllm_config),
            1 + speculative.num_speculative_tokens if own else None,
            folder if folder.is_dir() else None,
        )


def check_admission(vllm_config: Any, params: Any) -> EngineTraits | None:
    """Refuse an unsuitable request of an NLD model before the engine sees it; other models' requests pass.

    Returns:
        What the engine offers; None for other models.

    Raises:
        NLDError: see :func:`request_options`.
    """
    if vllm_config.model_config.hf_config.model_type != MODEL_TYPE or not hasattr(params, "extra_args"):
        return None
    if not hasattr(vllm_config, "nld_traits"):
        vllm_config.nld_traits = EngineTraits.of(vllm_config)
    traits: EngineTraits = vllm_config.nld_traits
    request_options(params, traits)
    return traits


def request_options(params: Any, engine: EngineTraits) -> NLDOptions:
    """Return the options of a request: its own keys over the engine's defaults.

    Args:
        params: vLLM's ``SamplingParams``.
        engine: what the engine offers.

    Raises:
        NLDError: the message names the key, the value, and what is allowed.
    """
    raw = _own_keys(params.extra_args or {})
    where = f'extra_args["{NAMESPACE}"]'
    if isinstance(raw, dict):
        NLDOptions.parse(raw, where)  # complain about the request's own keys first, in their own name
        raw = engine.defaults.model_dump(exclude_unset=True) | raw
    options = NLDOptions.parse(raw, where)
    own = _own_keys(params.extra_args or {})
    _check_engine(options, engine, own, where)
    _check_relevance(options, own, where)
    if options.mode == "diffusion":
        _check_diffusion(options, params, engine, where)
    return options


def _own_keys(extra_args: dict[str, Any]) -> Any:
    """Collect the request's keys from the forms it may use.

    A dict, a JSON string of one, or flat ``nld.KEY`` entries: the OpenAI server lets ``vllm_xargs`` hold strings,
    numbers and lists only.
    """
    nested = extra_args.get(NAMESPACE, {})
    if isinstance(nested, str):
        try:
            nested = json.loads(nested)
        except json.JSONDecodeError:
            raise NLDError(
                f'extra_args["{NAMESPACE}"]={nested!r} is not JSON; allowed: an object such as {{"mode": "diffusion"}}'
            ) from None
    flat = {key.removeprefix(f"{NAMESPACE}."): value for key, value in extra_args.items() if key.startswith("nld.")}
    others = [key for key in extra_args if key != NAMESPACE and not key.startswith("nld.")]
    refuse_misplaced(others, "extra_args", f'"{NAMESPACE}.mode", or an object "{NAMESPACE}",')
    for key in flat.keys() & BOOLEANS:
        if flat[key] in (0, 1):  # vllm_xargs has no booleans: they arrive as numbers
            flat[key] = bool(flat[key])
    return nested | flat if isinstance(nested, dict) else nested


def _check_engine(options: NLDOptions, engine: EngineTraits, own: dict[str, Any], where: str) -> None:
    if engine.block_length is None:
        if options.mode in ("diffusion", "self_speculation") and "mode" in own:
            raise NLDError(
                f"{where}.mode={options.mode!r} needs a server started with --speculative-config "
                '\'{"model": "vllm_nld.SelfSpeculation"}\'; this one allows: auto, ar'
            )
    elif options.block_length is not None and options.block_length > engine.block_length:
        raise NLDError(
            f"{where}.block_length={options.block_length}: allowed are 2 to {engine.block_length} "
            "(1 + num_speculative_tokens of this server)"
        )


def _check_relevance(options: NLDOptions, own: dict[str, Any], where: str) -> None:
    """Refuse a key that would have no effect: its author expects one."""
    for key in own:
        if key in ENGINE_KEYS:
            raise NLDError(
                f"{where}.{key}={own[key]!r} is not a request's to choose; allowed in "
                f'--additional-config \'{{"{NAMESPACE}": {{"{key}": ...}}}}\' of the server'
            )
        modes = MODES_OF_KEY.get(key)
        if modes is not None and options.mode not in modes:
            raise NLDError(
                f"{where}.{key}={own[key]!r} has no effect in mode {options.mode!r}; allowed with mode: "
                f"{', '.join(modes)}"
            )
        samplers = SAMPLERS_OF_KEY.get(key)
        if samplers is not None and options.sampler not in samplers:
            raise NLDError(
                f"{where}.{key}={own[key]!r} has no effect with sampler {options.sampler!r}; allowed with sampler: "
                f"{', '.join(samplers)}"
            )


def _check_diffusion(options: NLDOptions, params: Any, engine: EngineTraits, where: str) -> None:
    """Refuse what a diffusion request cannot hold."""
    if options.sampler == "learned" and engine.learned_sampler is None:
        raise NLDError(
            f"{where}.sampler='learned', but this checkpoint has no folder learned_sampler; allowed: "
            "confidence_threshold, top_k, left_to_right, entropy_budget"
        )
    if params.bad_words:
        raise NLDError(
            f"bad_words={params.bad_words!r} with mode 'diffusion': positions are decided out of order, so a word's "
            "start may not be known when its end is decided; allowed with mode: auto, ar, self_speculation"
        )
    if options.seed_first:
        return
    for name in ("logprobs", "structured_outputs"):
        value = getattr(params, name, None)
        if value is not None:
            raise NLDError(
                f"{name}={value!r} with {where}.seed_first=False: a block's first token is decided outside vLLM's "
                "sampler, which holds the log-probabilities and the grammar; allowed with seed_first=True"
            )
