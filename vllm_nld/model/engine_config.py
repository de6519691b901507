"""Checks and defaults before any weight loads: vLLM's hook ``verify_and_update_config`` for our architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from vllm_nld.checkpoints.draft_lora import adapter_of
from vllm_nld.checkpoints.headers import check_tensors
from vllm_nld.config import NemotronLabsDiffusionConfig, NemotronLabsDiffusionVLMConfig
from vllm_nld.errors import NLDError, shown
from vllm_nld.model.refusals import check_speculation_can_be_right
from vllm_nld.names import OWN_ARCHITECTURE, OWN_VLM_ARCHITECTURE, PROPOSER_PATHS
from vllm_nld.options import NLDOptions, is_ours
from vllm_nld.serving.admission import EngineTraits, check_defaults
from vllm_nld.vision.options import image_size_limit
from vllm_nld.vllm_glue import image_errors, registration, scheduling, workers
from vllm_nld.vllm_glue.image_requirements import why_no_images

CACHE_DTYPES = ("auto", "bfloat16", "float16", "float32", "fp8", "fp8_e4m3", "fp8_e5m2")
"""What the draft pass reads; vLLM's backends for a device may know fewer."""


class NLDEngineConfig:
    """vLLM's per-architecture hook (``vllm/model_executor/models/config.py: MODELS_CONFIG_MAP``).

    Attributes:
        upstream: vLLM's own hook for the architecture, if it has one.
        upstream_serves: whether vLLM itself registers the architecture.
        own_architecture: the name that only this extension registers.
        config_class: of the checkpoint's ``config.json``.
    """

    upstream: ClassVar[Any] = None
    upstream_serves: ClassVar[bool] = False
    own_architecture: ClassVar[str] = OWN_ARCHITECTURE
    config_class: ClassVar[type[NemotronLabsDiffusionConfig]] = NemotronLabsDiffusionConfig

    @classmethod
    def verify_and_update_model_config(cls, model_config: Any) -> None:
        """Do nothing: the engine's options are not known yet."""
        if cls.upstream is not None:
            cls.upstream.verify_and_update_model_config(model_config)

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Refuse what cannot work and fill in defaults.

        Raises:
            NLDError: an option, the checkpoint, or a combination is not suitable; the message names it.
        """
        if cls.upstream_serves and not _asks_for_this_extension(vllm_config):
            if cls.upstream is not None:
                cls.upstream.verify_and_update_config(vllm_config)
            return
        cls._use_own_model(vllm_config.model_config)
        NLDOptions.from_vllm_config(vllm_config)
        _check_positions(vllm_config.model_config)
        _check_layers(vllm_config.model_config.hf_config)
        _check_stages(vllm_config)
        if _is_self_speculation(vllm_config.speculative_config):
            check_speculation_can_be_right(vllm_config)
            _check_speculation(vllm_config)
            second = vllm_config.use_v2_model_runner
            workers.use_worker_subclass(vllm_config.parallel_config, second)
            if not second:  # there it is chosen when it is known whether it is asynchronous
                scheduling.use_scheduler_subclass(vllm_config.scheduler_config)
            _check_budget(vllm_config)
            adapter_of(vllm_config)
        check_defaults(EngineTraits.of(vllm_config))
        _check_weights(vllm_config)

    @classmethod
    def _use_own_model(cls, model_config: Any) -> None:
        """Point vLLM's model loader at this extension's model, under a name that only this extension registers."""
        if not isinstance(model_config.hf_config, cls.config_class):
            model_config.hf_config = cls.config_class.from_dict(model_config.hf_config.to_dict())
            model_config.hf_text_config = model_config.hf_config.get_text_config()
        model_config.hf_config.architectures = [cls.own_architecture]


class NLDVLMEngineConfig(NLDEngineConfig):
    """The same hook for the model that reads images."""

    own_architecture = OWN_VLM_ARCHITECTURE
    config_class = NemotronLabsDiffusionVLMConfig

    @classmethod
    def _use_own_model(cls, model_config: Any) -> None:
        """Also refuse what its images cannot work with."""
        reason = why_no_images()
        if reason is not None:
            raise NLDError(f"model {model_config.model!r}: {reason}")
        super()._use_own_model(model_config)
        images = model_config.multimodal_config
        image_size_limit(images.mm_processor_kwargs, model_config.hf_config)
        if images.enable_mm_embeds:
            raise NLDError("enable_mm_embeds=True: this model takes images, not their embeddings; allowed: False")
        image_errors.answer_with_400()


def _is_self_speculation(speculative: Any) -> bool:
    return speculative is not None and speculative.model in PROPOSER_PATHS


def _asks_for_this_extension(vllm_config: Any) -> bool:
    additional = vllm_config.additional_config
    return _is_self_speculation(vllm_config.speculative_config) or (
        isinstance(additional, dict) and any(map(is_ours, additional))
    )


def _check_positions(model_config: Any) -> None:
    limit = model_config.hf_config.position_limit
    if model_config.max_model_len > limit:
        raise NLDError(
            f"max_model_len={model_config.max_model_len}, but this checkpoint's rotary table ends at {limit} positions "
            f"(rope_parameters and max_position_embeddings); use at most {limit}"
        )


def _check_layers(config: NemotronLabsDiffusionConfig) -> None:
    for key, allowed in (("hidden_act", "silu"), ("sliding_window", None)):
        if getattr(config, key) != allowed:
            raise NLDError(f"config.json: {key}={shown(getattr(config, key))} is not supported; allowed: {allowed!r}")


def _check_stages(vllm_config: Any) -> None:
    stages, device = vllm_config.parallel_config.pipeline_parallel_size, vllm_config.device_config.device_type
    if stages > 1 and device == "cpu" and vllm_config.model_config.enforce_eager:
        raise NLDError(
            f"enforce_eager=True with pipeline_parallel_size={stages} on a CPU: vLLM makes the buffers between stages "
            "in a warm-up, which its CPU worker skips for eager models; leave enforce_eager out"
        )


def _check_speculation(vllm_config: Any) -> None:
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    if parallel.pipeline_parallel_size > 1:
        raise NLDError(
            f"pipeline_parallel_size={parallel.pipeline_parallel_size} with self-speculation: a draft runs the whole "
            "model, which no pipeline stage holds; use pipeline_parallel_size=1 (tensor_parallel_size is supported)"
        )
    if parallel.use_ray and not workers.ray_executor_runs_workers():
        raise NLDError(
            "VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0 with self-speculation: vLLM's older Ray executor bypasses the worker, "
            "which then cannot park requests; set it to 1"
        )
    _check_cache(vllm_config)
    block_length = vllm_config.model_config.hf_config.block_size
    drafts, limit = speculative.num_speculative_tokens, min(block_length - 1, registration.max_draft_tokens())
    if not 1 <= drafts <= limit:
        raise NLDError(
            f"speculative_config.num_speculative_tokens={drafts}, but a block of this checkpoint holds 1 seed and "
            f"{block_length - 1} drafts; allowed: 1 to {limit} (leave it out for {limit})"
        )


def _check_budget(vllm_config: Any) -> None:
    """Refuse a budget below a block if a cached prompt would never be admitted, or a draft forward would not fit."""
    scheduler = vllm_config.scheduler_config
    block = 1 + vllm_config.speculative_config.num_speculative_tokens
    if scheduler.max_num_batched_tokens < block and not scheduling.schedules_blocks(scheduler):
        raise NLDError(
            f"max_num_batched_tokens={scheduler.max_num_batched_tokens} with "
            f"scheduler_cls={scheduler.scheduler_cls!r}: vLLM pads a request with one token to compute to a block of "
            f"{block} tokens, which would never fit; use at least {block}, or leave scheduler_cls out"
        )
    # A forward runs whole blocks. vLLM compiles the model, and makes the LoRA buffers, for at most this many tokens.
    if scheduler.max_num_batched_tokens < block and (
        vllm_config.device_config.device_type != "cpu" or vllm_config.lora_config is not None
    ):
        raise NLDError(
            f"max_num_batched_tokens={scheduler.max_num_batched_tokens} with self-speculation on a GPU or with "
            f"--enable-lora: a draft forward runs a block of {block} tokens; use at least {block}, or fewer "
            "num_speculative_tokens"
        )


def _check_cache(vllm_config: Any) -> None:
    """Refuse a KV cache that the draft pass cannot read, whether the user or the checkpoint asks for it.

    A compressed-tensors checkpoint's scheme makes "auto" fp8 when vLLM makes the layers, and nothing else.
    """
    cache_dtype, asked = vllm_config.cache_config.cache_dtype, cache_scheme(vllm_config.model_config.hf_config)
    if cache_dtype not in CACHE_DTYPES:
        source = f" (the checkpoint's quantization config asks for {shown(asked)})" if asked else ""
        raise NLDError(
            f"kv_cache_dtype={cache_dtype!r} with self-speculation{source}: the draft pass cannot read such a cache; "
            f"allowed: {', '.join(CACHE_DTYPES)}" + (", for instance --kv-cache-dtype bfloat16" if asked else "")
        )


def cache_scheme(hf_config: Any) -> Any:
    """Return the KV cache entry of a checkpoint's quantization config: a dict, a name, or None."""
    quantization = getattr(hf_config, "quantization_config", None) or getattr(hf_config, "compression_config", None)
    if not isinstance(quantization, dict):
        return None
    nested = quantization.get("quantization")  # ModelOpt's, in hf_quant_config.json
    for part in (quantization, nested if isinstance(nested, dict) else {}):
        asked = part.get("kv_cache_scheme") or part.get("kv_cache_quant_algo")
        if asked:
            return asked
    return None


def _check_weights(vllm_config: Any) -> None:
    """Compare a local checkpoint's tensor headers with its config. Other sources are checked during loading.

    vLLM makes ``vllm_config.quant_config`` after this hook, but the model config already has the method.
    """
    model_config = vllm_config.model_config
    folder = Path(model_config.model)
    if folder.is_dir() and vllm_config.load_config.load_format == "auto":
        check_tensors(folder, model_config.hf_config, quantized=model_config.quantization is not None)


def install(hook: type[NLDEngineConfig], architecture: str, upstream_serves: bool) -> None:
    """Put a hook into vLLM's map, before any hook that is already there."""
    hooks = registration.model_config_hooks()
    if hooks.get(architecture) is not hook:
        hook.upstream = hooks.get(architecture)
        hook.upstream_serves = upstream_serves
        hooks[architecture] = hook
