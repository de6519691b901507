"""Options of the draft adapter's training."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vllm_nld.checkpoints.draft_lora import TARGETS, in_order
from vllm_nld.errors import NLDError

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Settings(BaseModel):
    """All settings that decide what a run computes. A resumed run must have the same values."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    rank: int = Field(default=128, ge=1, le=4_096)
    targets: tuple[Projection, ...] = Field(
        default=("o_proj",), min_length=1, description="the projections that change"
    )
    mask_row: bool = Field(default=False, description="also train the mask token's input row")
    alpha: float | None = Field(default=None, gt=0, description="None: 4 times the rank, as released")
    block_length: int | None = Field(default=None, ge=2, le=128, description="None: the checkpoint's")
    steps: int = Field(default=1000, ge=1, le=10_000_000)
    learning_rate: float = Field(default=1e-3, gt=0)
    warm_up: int = Field(default=50, ge=0, description="steps; then the rate falls linearly to 0")
    seconds: float | None = Field(
        default=None, gt=0, description="of training; None: all steps. The rate falls in them"
    )
    batch: int = Field(default=16, ge=1, le=100_000, description="sequences per step")
    micro_batch: int | None = Field(
        default=None, ge=1, le=100_000, description="sequences per forward; None: all of a batch"
    )
    blocks: int = Field(default=16, ge=1, le=100_000, description="drafted blocks per sequence")
    own_text: bool = Field(default=True, description="train on the model's greedy continuations, not on the text")
    rows: int = Field(default=2048, ge=1, le=10_000_000, description="sequences to train on")
    prefix_tokens: int = Field(default=128, ge=1, le=1_000_000, description="of the data, before the model's own text")
    new_tokens: int = Field(default=128, ge=1, le=1_000_000, description="of own text per sequence")
    held_out_rows: int = Field(default=48, ge=1, le=1_000_000, description="sequences that the curve is measured on")
    kl_weight: float = Field(default=1.0, ge=0)
    ce_weight: float = Field(default=1.0, ge=0)
    temperature: float = Field(default=3.0, gt=0)
    top_k: int = Field(default=200, ge=1)
    eta: float = Field(default=0.5, ge=0)
    beyond: float = Field(
        default=0.0, ge=0, le=1, description="what drafts after the first rejected one count, by distance"
    )
    drawn_share: float = Field(default=0.9, ge=0, le=1, description="of the blocks draw their drafts at temperature 1")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="of the frozen weights")
    seed: int = Field(default=0, ge=0, lt=2**63)

    @field_validator("targets", mode="before")
    @classmethod
    def _listed(cls, targets: Any) -> Any:
        """Take ``all``, or names with commas between them."""
        if targets == "all":
            return TARGETS
        return [name.strip() for name in targets.split(",")] if isinstance(targets, str) else targets

    @field_validator("targets")
    @classmethod
    def _in_order(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        return in_order(targets)

    @classmethod
    def of(cls, **options: Any) -> Settings:
        """Build from options.

        Raises:
            NLDError: a value is not allowed; the message names the option, the value and what is allowed.
        """
        try:
            return cls(**options)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            allowed = first["msg"].removeprefix("Input should be ")
            raise NLDError(f"{option(name)} {options[name]}: allowed: {allowed}") from None

    @property
    def scale_alpha(self) -> float:
        """The adapter's alpha."""
        return 4.0 * self.rank if self.alpha is None else self.alpha

    def done(self, step: int, seconds: float = 0.0) -> float:
        """Return which share of the training is over after so many steps and seconds; from 1 on, all is."""
        by_time = 0.0 if self.seconds is None else seconds / self.seconds
        return max(step / self.steps, by_time)

    def rate(self, step: int, seconds: float = 0.0) -> float:
        """Return the learning rate of a step, from 0 on, that begins after so many seconds of training."""
        warm = min(1.0, (step + 1) / (self.warm_up + 1))
        return self.learning_rate * warm * max(0.0, 1 - self.done(step, seconds))

    def check_same(self, before: dict[str, Any]) -> None:
        """Check that a resumed run has the settings that it began with.

        Raises:
            NLDError: a setting differs; the message names it and both values.
        """
        for name, value in self.model_dump().items():
            if name not in before or before[name] != value:
                raise NLDError(
                    f"--resume: {option(name)} is {value}, but the run began with {before.get(name)}; "
                    "allowed: the same value, or another --output"
                )


def option(name: str) -> str:
    """Return the command-line option of a setting."""
    return "--" + name.replace("_", "-")
