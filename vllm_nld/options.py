"""The extension's own options: ``--additional-config '{"nld": {...}}'``."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_nld.errors import NLDError

NAMESPACE = "nld"


class NLDOptions(BaseModel):
    """Options under ``additional_config["nld"]``. Unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    draft_threshold: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="0 fills a block by one draft forward. Above 0, each draft forward commits only the positions at "
        "least this probable (and always the best one), and drafting repeats until the block is full.",
    )

    @classmethod
    def from_vllm_config(cls, vllm_config: Any) -> NLDOptions:
        """Read the options of an engine.

        Raises:
            NLDError: a key is unknown, or a value has the wrong type or lies outside its range.
        """
        additional = vllm_config.additional_config
        return cls.parse(additional.get(NAMESPACE, {}) if isinstance(additional, dict) else {})

    @classmethod
    def parse(cls, raw: object) -> NLDOptions:
        """Validate ``raw``; see :meth:`from_vllm_config`."""
        if not isinstance(raw, dict):
            raise NLDError(f'additional_config["{NAMESPACE}"]={raw!r}, but an object such as {{}} is needed')
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise NLDError("; ".join(_explain(item) for item in error.errors())) from None


def _explain(item: Any) -> str:
    """One pydantic complaint as: option, value, what is allowed."""
    key = ".".join(str(part) for part in item["loc"])
    name = f'additional_config["{NAMESPACE}"].{key}'
    if item["type"] == "extra_forbidden":
        return f"{name}={item['input']!r} is unknown; allowed keys: {', '.join(NLDOptions.model_fields)}"
    return f"{name}={item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"
