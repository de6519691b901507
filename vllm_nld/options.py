"""The extension's own options, for an engine and for a request.

An engine's defaults come from ``--additional-config '{"nld": {...}}'``. A request overrides them by
``SamplingParams(extra_args={"nld": {...}})``, or ``vllm_xargs`` of the OpenAI server
(:mod:`vllm_nld.serving.admission`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_nld.errors import NLDError, shown, shown_key
from vllm_nld.names import NAMESPACE

Mode = Literal["auto", "ar", "diffusion", "self_speculation"]
Sampler = Literal["confidence_threshold", "top_k", "left_to_right", "entropy_budget", "learned"]

MANY = 1 << 16
"""Bound of what is counted in tokens or forwards of a block: more than any block has, and no tensor overflows."""
HOTTEST = 2.0
"""Highest temperature: vLLM's own bound."""
_SHOWN = 3


class NLDOptions(BaseModel):
    """Options under ``nld``. Unknown keys and wrong types are refused, and so is every number without bounds."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    mode: Mode = Field(
        default="auto",
        description="How a request decodes. auto picks AR or self-speculation per step by cost and acceptance; "
        "diffusion is never picked, since its text is not AR's.",
    )
    block_length: int | None = Field(
        default=None,
        ge=2,
        le=MANY,
        description="Tokens of a block, seed included; at most 1 + num_speculative_tokens, which is the default.",
    )
    draft_threshold: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="Self-speculation. 0 fills a block by one draft forward. Above 0, each draft forward commits only "
        "the positions at least this probable (and always the best one), and drafting repeats until the block is full.",
    )
    draft_lora: str = Field(
        default="auto",
        description="Engine only. The adapter that is active while self-speculation drafts: 'auto' takes the "
        "checkpoint's own (its folder linear_spec_lora) if it brings one, 'off' none; else the path of a PEFT folder.",
    )
    draft_adapter: bool = Field(
        default=True,
        description="Self-speculation. Draft with the engine's adapter, if it has one.",
    )
    prompt_lookup: int = Field(
        default=3,
        ge=0,
        le=16,
        description="Self-speculation. Behind the first unsure draft, draft what followed the last so many tokens at "
        "their latest earlier occurrence in prompt and text (drawn drafts are left alone); in auto mode, "
        "do so also instead of drafting. 0 does not.",
    )
    sampled_drafts: bool = Field(
        default=True,
        description="Self-speculation of requests with a temperature. True draws the drafts from the draft's own "
        "distribution, which the rejection sampler is told; False drafts the most probable tokens.",
    )
    sampler: Sampler = Field(
        default="confidence_threshold",
        description="Diffusion. Which masked positions a denoising forward commits.",
    )
    threshold: float = Field(
        default=0.9,
        ge=0.0,
        le=1.0,
        description="Diffusion, samplers confidence_threshold and learned: commit the positions of at least this "
        "confidence, or this predicted probability to be right (and always the one of highest confidence).",
    )
    tokens_per_step: int | None = Field(
        default=None,
        ge=1,
        le=MANY,
        description="Diffusion, samplers top_k and left_to_right: positions committed by a denoising forward. By "
        "default an even share of the block over max_denoising_steps, or 1.",
    )
    entropy_budget: float = Field(
        default=0.3,
        ge=0.0,
        le=1e6,
        description="Diffusion, sampler entropy_budget: commit positions in order of entropy while the sum of their "
        "entropies without the largest stays within this many nats.",
    )
    max_denoising_steps: int | None = Field(
        default=None,
        ge=1,
        le=MANY,
        description="Diffusion: denoising forwards per block; the last one commits all that is left.",
    )
    temperature: float | None = Field(
        default=None,
        ge=0.0,
        le=HOTTEST,
        description="Diffusion: temperature of the denoising passes; by default the request's own temperature.",
    )
    seed_first: bool = Field(
        default=True,
        description="Diffusion: the causal pass decides a block's first token. False masks that position, too, as "
        "servers do that have no causal seed.",
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
    def parse(cls, raw: object, where: str = f'additional_config["{NAMESPACE}"]') -> NLDOptions:
        """Validate ``raw``, which came from ``where``; see :meth:`from_vllm_config`."""
        if not isinstance(raw, dict):
            raise NLDError(f"{where}={shown(raw)}, but an object such as {{}} is needed")
        problems = [
            f"{where}.{shown_key(key)}={shown(value)} is unknown; allowed keys: {', '.join(cls.model_fields)}"
            for key, value in raw.items()
            if key not in cls.model_fields
        ]
        try:
            options = cls.model_validate({key: raw[key] for key in cls.model_fields if key in raw})
        except ValidationError as error:
            problems = [_explain(item, where) for item in error.errors()] + problems
        if problems:
            more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
            raise NLDError("; ".join(problems[:_SHOWN]) + more)
        return options


def is_ours(key: object) -> bool:
    """Whether a key, of a dictionary that others use, too, is ``nld`` or a near miss of it."""
    return isinstance(key, str) and re.match(rf"{NAMESPACE}([._-]|$)", key, re.IGNORECASE) is not None


def refuse_misplaced(keys: Iterable[object], where: str, example: str) -> None:
    """Raise NLDError if one of ``keys``, which nobody reads, is meant for this extension."""
    for key in keys:
        if is_ours(key):
            raise NLDError(f'{where}["{shown_key(key)}"] is unknown; this extension reads {example} there')


def _explain(item: Any, where: str) -> str:
    """One pydantic complaint as: option, value, what is allowed."""
    return f"{where}.{item['loc'][0]}={shown(item['input'])}: {item['msg'][0].lower()}{item['msg'][1:]}"
