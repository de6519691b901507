"""The extension's own options, for an engine and for a request.

An engine's defaults come from ``--additional-config '{"nld": {...}}'``. A request overrides them with
``SamplingParams(extra_args={"nld": {...}})``, or with ``vllm_xargs`` of the OpenAI server
(:mod:`vllm_nld.serving.admission`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from vllm_nld.draft_sources import OPTIONS as SOURCE_OPTIONS
from vllm_nld.errors import NLDError, shown, shown_key
from vllm_nld.names import NAMESPACE
from vllm_nld.option import Option
from vllm_nld.policies import OPTIONS as POLICY_OPTIONS
from vllm_nld.policies import POLICIES

Mode = Literal["auto", "ar", "diffusion", "self_speculation"]

MANY = 1 << 16
"""Limit of options that count tokens or forwards of a block: more than any block has, and no tensor overflows."""
HOTTEST = 2.0
"""Highest temperature: vLLM's own bound."""
_SHOWN = 3


MOST_BRANCHES = 64
"""Branches that a request may ask for: more only make its steps longer."""

SPECULATIVE: tuple[Mode, ...] = ("auto", "self_speculation")
DIFFUSION: tuple[Mode, ...] = ("diffusion",)
_CONFIG = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _branches(value: object) -> object:
    if value in ("off", "auto", "all") or (type(value) is int and 1 <= value <= MOST_BRANCHES):
        return value
    raise ValueError(f"allowed are 'off', 'auto', 'all', or a number from 1 to {MOST_BRANCHES}")


Branches = Annotated[int | str, BeforeValidator(_branches)]


def _option(default: Any, description: str, *, modes: Sequence[Mode], **bounds: Any) -> Any:
    """Declare an option that has an effect in some modes only."""
    return Field(default=default, description=description, json_schema_extra={"modes": list(modes)}, **bounds)


def _declared(options: Iterable[Option], modes: Sequence[Mode]) -> dict[str, Any]:
    """Return pydantic fields of options that policies or sources bring along."""
    return {own.name: (own.type, _option(own.default, own.description, modes=modes, **own.bounds)) for own in options}


if TYPE_CHECKING:
    Sampler = str
    RegisteredOptions = BaseModel
else:
    Sampler = Literal[tuple(POLICIES)]
    RegisteredOptions = create_model(
        "RegisteredOptions",
        __config__=_CONFIG,
        **_declared(SOURCE_OPTIONS.values(), SPECULATIVE),
        **_declared(POLICY_OPTIONS.values(), DIFFUSION),
    )


class NLDOptions(RegisteredOptions):
    """Options under ``nld``. Unknown keys, wrong types and unbounded numbers are refused.

    Each draft source (:mod:`vllm_nld.draft_sources`) and each selection policy (:mod:`vllm_nld.policies`) adds its own.
    """

    model_config = _CONFIG

    mode: Mode = Field(
        default="auto",
        description="How a request decodes. auto picks AR or self-speculation per step by cost and acceptance; "
        "diffusion is never picked, because its text differs from AR's.",
    )
    report: bool = Field(
        default=False,
        description="Say in the responses of chat completions how each token came, and what forwards it took.",
    )
    block_length: int | None = _option(
        default=None,
        ge=2,
        le=MANY,
        description="Tokens of a block, seed included; at most 1 + num_speculative_tokens, which is the default.",
        modes=(*SPECULATIVE, *DIFFUSION),
    )
    draft_threshold: float = _option(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="Self-speculation. 0 fills a block in one draft forward. Above 0, each draft forward commits only "
        "the positions at least this probable (and always the best one), and drafting repeats until the block is full.",
        modes=SPECULATIVE,
    )
    draft_lora: str = Field(
        default="auto",
        description="Engine only. The adapter that is active while self-speculation drafts: 'auto' uses the "
        "checkpoint's own (its folder linear_spec_lora) if it has one, 'off' none; else the path of a PEFT folder.",
    )
    draft_adapter: bool = _option(
        default=True,
        description="Self-speculation. Draft with the engine's adapter, if it has one.",
        modes=SPECULATIVE,
    )
    branches: Branches = _option(
        default="off",
        description="Self-speculation. How many blocks a verify forward drafts for the places where verification is "
        "likely to end; if it ends at one of them, no draft forward is needed. 'auto' takes those that save more time "
        "than they cost here; 'all' is quadratic self-speculation.",
        modes=SPECULATIVE,
    )
    branch_length: int | None = _option(
        default=None,
        ge=2,
        le=MANY,
        description="Self-speculation with branches: tokens of a branch's block, its seed included. Default: 8, or "
        "the block length if that is shorter or branches is 'all'.",
        modes=SPECULATIVE,
    )
    sampled_drafts: bool = _option(
        default=True,
        description="Self-speculation of requests with a temperature. True draws the drafts from the draft's own "
        "distribution, which the rejection sampler is told; False drafts the most probable tokens.",
        modes=SPECULATIVE,
    )
    sampler: Sampler = _option(
        default=next(iter(POLICIES)),
        description="Diffusion. Which masked positions a denoising forward commits.",
        modes=DIFFUSION,
    )
    max_denoising_steps: int | None = _option(
        default=None,
        ge=1,
        le=MANY,
        description="Diffusion: denoising forwards per block; the last one commits all remaining positions.",
        modes=DIFFUSION,
    )
    temperature: float | None = _option(
        default=None,
        ge=0.0,
        le=HOTTEST,
        description="Diffusion: temperature of the denoising passes. Default: the request's own, which a block's first "
        "token keeps in any case.",
        modes=DIFFUSION,
    )
    seed_first: bool = _option(
        default=True,
        description="Diffusion: the causal pass decides a block's first token. False also masks that position, as "
        "servers without a causal seed do.",
        modes=DIFFUSION,
    )

    @classmethod
    def from_vllm_config(cls, vllm_config: Any) -> NLDOptions:
        """Read the defaults of an engine.

        Raises:
            NLDError: a key is unknown, or a value has the wrong type or lies outside its range.
        """
        additional = vllm_config.additional_config
        if not isinstance(additional, dict):
            return cls.parse({})
        refuse_misplaced(additional.keys() - {NAMESPACE}, "additional_config", f'{{"{NAMESPACE}": {{"mode": "ar"}}}}')
        return cls.parse(additional.get(NAMESPACE, {}))

    @classmethod
    def keys(cls) -> list[str]:
        """Return the names of all options, those of draft sources and selection policies last."""
        registered = [*SOURCE_OPTIONS, *POLICY_OPTIONS]
        return [*(name for name in cls.model_fields if name not in registered), *registered]

    @classmethod
    def parse(cls, raw: object, where: str = f'additional_config["{NAMESPACE}"]') -> NLDOptions:
        """Validate ``raw``, which came from ``where``; see :meth:`from_vllm_config`."""
        if not isinstance(raw, dict):
            raise NLDError(f"{where}={shown(raw)}, but an object such as {{}} is needed")
        unknown = [key for key in raw if key not in cls.model_fields]
        allowed = ", ".join(cls.keys()) if unknown else ""
        problems = [
            f"{where}.{shown_key(key)}={shown(raw[key])} is unknown; allowed keys: {allowed}" for key in unknown
        ]
        try:
            options = cls.model_validate({key: raw[key] for key in cls.model_fields if key in raw})
        except ValidationError as error:
            problems = [_explain(item, where) for item in error.errors()] + problems
        if problems:
            more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
            raise NLDError("; ".join(problems[:_SHOWN]) + more)
        return options


def _modes(field: Any) -> tuple[str, ...] | None:
    extra = field.json_schema_extra
    return tuple(extra["modes"]) if isinstance(extra, dict) else None


MODES_OF_KEY: dict[str, tuple[str, ...]] = {
    name: modes for name, field in NLDOptions.model_fields.items() if (modes := _modes(field)) is not None
}
"""The modes in which an option has an effect, for the options that a request may set besides ``mode``."""


def is_ours(key: object) -> bool:
    """Whether a key of a dictionary that others also use is ``nld``, or a misspelling of it."""
    return isinstance(key, str) and re.match(rf"{NAMESPACE}([._-]|$)", key, re.IGNORECASE) is not None


def refuse_misplaced(keys: Iterable[object], where: str, example: str) -> None:
    """Raise NLDError if one of ``keys``, which no code reads, is meant for this extension."""
    for key in keys:
        if is_ours(key):
            raise NLDError(f'{where}["{shown_key(key)}"] is unknown; this extension reads {example} there')


def _explain(item: Any, where: str) -> str:
    """Return one pydantic error as: option, value, what is allowed."""
    message = item["msg"].removeprefix("Value error, ")
    return f"{where}.{item['loc'][0]}={shown(item['input'])}: {message[0].lower()}{message[1:]}"
