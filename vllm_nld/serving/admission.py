"""The options of one request, checked when the request is admitted.

The API process, where an unsuitable request becomes an HTTP 400, and the worker, which uses the options, call the same
function.
"""

from __future__ import annotations

import json
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_nld.errors import NLDError, shown, shown_key
from vllm_nld.names import MODEL_TYPES, NAMESPACE, PROPOSER_PATHS
from vllm_nld.options import MODES_OF_KEY, NLDOptions, refuse_misplaced
from vllm_nld.policies import POLICIES, policies_with

LEARNED_SAMPLER_FOLDER = "learned_sampler"

ENGINE_KEYS = ("draft_lora",)
"""Options that a request cannot set, because they are fixed when the engine loads."""
BOOLEANS = {key for key, field in NLDOptions.model_fields.items() if field.annotation is bool}


@dataclass(frozen=True)
class EngineTraits:
    """What an engine offers to requests.

    Attributes:
        defaults: the engine's own options.
        block_length: tokens of the longest block, seed included; None without ``--speculative-config``.
        learned_sampler: the folder of the checkpoint's learned sampler, if it has one.
        no_branches: why verify forwards cannot branch; None: they can.
        no_report: why the engine cannot say how tokens came; None: it can.
        second: whether self-speculation runs on vLLM's second model runner (``docs/operate/runners.md``).
    """

    defaults: NLDOptions
    block_length: int | None
    learned_sampler: Path | None = None
    no_branches: str | None = None
    no_report: str | None = None
    second: bool = False

    @classmethod
    def of(cls, vllm_config: Any) -> EngineTraits:
        """Read them from vLLM's config.

        Raises:
            NLDError: the engine's own options are not suitable.
        """
        speculative = vllm_config.speculative_config
        own = speculative is not None and speculative.model in PROPOSER_PATHS
        folder = Path(vllm_config.model_config.model) / LEARNED_SAMPLER_FOLDER
        return cls(
            NLDOptions.from_vllm_config(vllm_config),
            1 + speculative.num_speculative_tokens if own else None,
            folder if folder.is_dir() else None,
            _why_no_branches(vllm_config),
            _why_no_report(vllm_config, own),
            own and bool(getattr(vllm_config, "use_v2_model_runner", False)),
        )


def _why_no_branches(vllm_config: Any) -> str | None:
    """Return what keeps verify forwards from branching: a branch's tokens have ids, and no LoRA of their request."""
    if vllm_config.lora_config is not None:
        return "--enable-lora"
    if getattr(vllm_config.model_config, "enable_prompt_embeds", False):
        return "--enable-prompt-embeds"
    return "a model that reads images" if getattr(vllm_config.model_config, "is_multimodal_model", False) else None


def _why_no_report(vllm_config: Any, own: bool) -> str | None:
    """Return what keeps an engine from saying how tokens came: that comes from its proposer, by its scheduler."""
    if not own:
        return """a server started without --speculative-config '{"model": "vllm_nld.SelfSpeculation"}'"""
    chosen = vllm_config.scheduler_config.scheduler_cls
    known = pkgutil.resolve_name(chosen) if isinstance(chosen, str) else chosen
    return None if getattr(known, "schedules_blocks", False) else f"--scheduler-cls {chosen!r}"


def check_admission(vllm_config: Any, params: Any) -> EngineTraits | None:
    """Refuse an unsuitable request of an NLD model before the engine sees it; other models' requests pass.

    Returns:
        The engine's traits; None for other models.

    Raises:
        NLDError: see :func:`request_options`; or an integer of vLLM's own is too large.
    """
    if vllm_config.model_config.hf_config.model_type not in MODEL_TYPES or not hasattr(params, "extra_args"):
        return None
    if not hasattr(vllm_config, "nld_traits"):
        vllm_config.nld_traits = EngineTraits.of(vllm_config)
    traits: EngineTraits = vllm_config.nld_traits
    _check_integers(params)
    _check_texts(params.extra_args)
    request_options(params, traits)
    return traits


def _check_integers(params: Any) -> None:
    """Refuse integers that vLLM cannot send to the engine. It checks most, but answers HTTP 500 for the others."""
    for name in getattr(params, "__struct_fields__", ()):
        value = getattr(params, name)
        if isinstance(value, int) and not -(2**63) <= value < 2**64:
            raise NLDError(f"{name}={shown(value)}: allowed are integers of 64 bits")


def _check_texts(extra_args: Any) -> None:
    """Refuse keys and strings that no encoding can send to the engine: vLLM would answer HTTP 500."""
    for key, value in extra_args.items() if isinstance(extra_args, dict) else ():
        for text in (key, *(value if isinstance(value, list) else [value])):
            if isinstance(text, str) and not text.isascii() and _is_unsendable(text):
                raise NLDError(f"extra_args[{shown_key(key)}]: half a surrogate pair; allowed: text in UTF-8")


def _is_unsendable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def check_defaults(engine: EngineTraits) -> None:
    """Refuse engine defaults with which every request would be refused.

    Raises:
        NLDError: the message names the key, the value, and what is allowed.
    """
    where = f'additional_config["{NAMESPACE}"]'
    _check_engine(engine.defaults, engine, {}, where)
    _check_branches(engine.defaults, engine, where)
    _check_sampler(engine.defaults, engine, where)


def request_options(params: Any, engine: EngineTraits) -> NLDOptions:
    """Return the options of a request: its own keys over the engine's defaults.

    Args:
        params: vLLM's ``SamplingParams``.
        engine: the engine's traits.

    Raises:
        NLDError: the message names the key, the value, and what is allowed.
    """
    where = f'extra_args["{NAMESPACE}"]'
    own = _own_keys(params.extra_args, where)
    NLDOptions.parse(own, where)  # report the request's own keys first, by their own names
    options = NLDOptions.parse(engine.defaults.model_dump(exclude_unset=True) | own, where)
    _check_engine(options, engine, own, where)
    _check_relevance(options, own, where)
    _check_branches(options, engine, where)
    if options.report:
        _check_report(params, engine, where)
    if engine.second:
        _check_second_runner(options, own, where)
    if options.mode == "diffusion":
        if engine.second:
            _check_second_diffusion(params, where)
        _check_diffusion(options, params, engine, where)
    return options


def _own_keys(extra_args: Any, where: str) -> dict[Any, Any]:
    """Collect the request's keys from the forms it may use.

    A dict, a JSON string of one, or flat ``nld.KEY`` entries, because the OpenAI server lets ``vllm_xargs`` hold only
    strings, numbers and lists.
    """
    if extra_args is None:
        return {}
    if not isinstance(extra_args, dict):
        raise NLDError(f"extra_args={shown(extra_args)}, but an object such as {{}} is needed")
    nested = extra_args.get(NAMESPACE, {})
    if isinstance(nested, str):
        nested = _from_json(nested, where)
    if not isinstance(nested, dict):
        raise NLDError(f"{where}={shown(nested)}, but an object such as {{}} is needed")
    refuse_misplaced(
        (key for key in extra_args if key != NAMESPACE and not _is_flat(key)),
        "extra_args",
        f'"{NAMESPACE}.mode", or an object "{NAMESPACE}",',
    )
    flat = {key.removeprefix(f"{NAMESPACE}."): value for key, value in extra_args.items() if _is_flat(key)}
    for key in flat.keys() & nested.keys():
        raise NLDError(f'{where}.{shown_key(key)} is given twice, the other time as "{NAMESPACE}.KEY"; allowed: once')
    for key in flat.keys() & BOOLEANS:
        if isinstance(flat[key], int | float) and flat[key] in (0, 1):
            flat[key] = bool(flat[key])  # vllm_xargs has no booleans, so they arrive as numbers
    return nested | flat


def _is_flat(key: object) -> bool:
    return isinstance(key, str) and key.startswith(f"{NAMESPACE}.")


def _from_json(text: str, where: str) -> Any:
    """Parse a request's JSON. Python's parser also fails on deep nesting and on integers with thousands of digits."""
    try:
        return json.loads(text, object_pairs_hook=_without_repetition)
    except NLDError as error:
        raise NLDError(f"{where}={shown(text)}: {error}") from None
    except (ValueError, RecursionError):
        raise NLDError(
            f'{where}={shown(text)} is not JSON; allowed: an object such as {{"mode": "diffusion"}}'
        ) from None


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise NLDError("a key is given twice; allowed: once")
    return found


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


def _check_sampler(options: NLDOptions, engine: EngineTraits, where: str) -> None:
    if "learned" in POLICIES[options.sampler].needs and engine.learned_sampler is None:
        others = ", ".join(name for name, policy in POLICIES.items() if "learned" not in policy.needs)
        raise NLDError(
            f"{where}.sampler={options.sampler!r}, but this checkpoint has no folder {LEARNED_SAMPLER_FOLDER}; "
            f"allowed: {others}"
        )


def _check_relevance(options: NLDOptions, own: dict[str, Any], where: str) -> None:
    """Refuse keys that have no effect in this mode: ignoring them silently would mislead the user."""
    for key in own:
        if key in ENGINE_KEYS:
            raise NLDError(
                f"{where}.{key}={shown(own[key])} can only be set for the whole server, in "
                f'--additional-config \'{{"{NAMESPACE}": {{"{key}": ...}}}}\''
            )
        modes = MODES_OF_KEY.get(key)
        if modes is not None and options.mode not in modes:
            raise NLDError(
                f"{where}.{key}={shown(own[key])} has no effect in mode {options.mode!r}; allowed with mode: "
                f"{', '.join(modes)}"
            )
        samplers = policies_with(key)
        if samplers and options.sampler not in samplers:
            raise NLDError(
                f"{where}.{key}={shown(own[key])} has no effect with sampler {options.sampler!r}; "
                f"allowed with sampler: {', '.join(samplers)}"
            )


def _check_branches(options: NLDOptions, engine: EngineTraits, where: str) -> None:
    """Refuse branches where there can be none, and lengths that would be ignored."""
    if options.branches == "off":
        if options.branch_length is not None:
            raise NLDError(f"{where}.branch_length={options.branch_length} has no effect with branches='off'")
        return
    if engine.no_branches is not None:
        raise NLDError(f"{where}.branches={shown(options.branches)} with {engine.no_branches}; allowed: 'off'")
    longest = options.block_length or engine.block_length
    if longest is not None and (options.branch_length or 0) > longest:
        raise NLDError(f"{where}.branch_length={options.branch_length}; allowed are 2 to the block length, {longest}")


def _check_report(params: Any, engine: EngineTraits, where: str) -> None:
    """Refuse reports that nobody could make, and those of several texts at once."""
    if engine.no_report is not None:
        raise NLDError(f"{where}.report=True with {engine.no_report}; allowed: False")
    if getattr(params, "n", 1) > 1:
        raise NLDError(f"n={params.n} with {where}.report=True; allowed: 1")


LONGEST_BRANCH = 64
"""Tokens of a branch on vLLM's second runner, which has so many streams of noise for the drafts of one position."""


def _check_second_runner(options: NLDOptions, own: dict[str, Any], where: str) -> None:
    """Refuse what self-speculation cannot do yet on vLLM's second model runner."""
    for key, value, allowed in (
        ("seed_first", options.seed_first, True),
        ("draft_threshold", options.draft_threshold, 0),
        ("prompt_lookup", own.get("prompt_lookup") or 0, 0),
    ):
        if value != allowed:
            raise NLDError(
                f"{where}.{key}={shown(value)} on vLLM's second model runner; allowed: {allowed} (a server started "
                "with VLLM_USE_V2_MODEL_RUNNER=0 allows it)"
            )
    if options.branches == "auto":
        raise NLDError(f"{where}.branches='auto' on vLLM's second model runner; allowed: 'off', 'all', or a number")
    if (options.branch_length or 0) > LONGEST_BRANCH:
        raise NLDError(
            f"{where}.branch_length={options.branch_length} on vLLM's second model runner; allowed: 2 to "
            f"{LONGEST_BRANCH}"
        )


def _check_second_diffusion(params: Any, where: str) -> None:
    """Refuse what the denoising passes of vLLM's second model runner ignore so far."""
    plain: dict[str, Any] = {
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_tokens": 0,
        "allowed_token_ids": None,
        "thinking_token_budget": None,
    }
    for name, off in plain.items():
        value = getattr(params, name, off)
        if value != off:
            raise NLDError(
                f"{name}={shown(value)} with {where}.mode='diffusion' on vLLM's second model runner; allowed: {off} (a "
                "server started with VLLM_USE_V2_MODEL_RUNNER=0 allows it)"
            )


def _check_diffusion(options: NLDOptions, params: Any, engine: EngineTraits, where: str) -> None:
    """Refuse parameters that a diffusion request cannot have."""
    _check_sampler(options, engine, where)
    if params.bad_words:
        raise NLDError(
            f"bad_words={shown(params.bad_words)} with mode 'diffusion': positions are decided out of order, so the "
            "start of a word may be unknown when its end is decided; allowed with mode: auto, ar, self_speculation"
        )
    if options.seed_first:
        return
    for name in ("logprobs", "structured_outputs"):
        value = getattr(params, name, None)
        if value is not None:
            raise NLDError(
                f"{name}={shown(value)} with {where}.seed_first=False: a block's first token is decided outside vLLM's "
                "sampler, which holds the log-probabilities and the grammar; allowed with seed_first=True"
            )
