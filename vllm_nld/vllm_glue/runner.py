"""Uses of vLLM's first (V1) model runner."""

from __future__ import annotations

from typing import Any

from vllm_nld.errors import NLDError
from vllm_nld.vllm_glue.versions import SUPPORTED


def set_active_loras(runner: Any, by_logit: list[int], by_token: list[int], requests: set[Any]) -> None:
    """Have the next forward use LoRAs.

    Args:
        runner: vLLM's model runner, with LoRAs enabled.
        by_logit: LoRA id of every row of logits; 0 for none.
        by_token: LoRA id of every token.
        requests: the ``LoRARequest`` of every id.

    Raises:
        NLDError: the runner has no ``_set_active_loras``.
    """
    if not hasattr(runner, "_set_active_loras"):
        raise NLDError(f"this vLLM's model runner has no '_set_active_loras'; vllm-nld supports vLLM {SUPPORTED}")
    runner._set_active_loras(tuple(by_logit), tuple(by_token), requests)


def attach_proposer(runner: Any, drafts: int) -> None:
    """Attach the proposer to the runner, and have it asked for drafts also near the length limit.

    Without the second part, vLLM replaces all drafts of a batch by zeros as soon as one request is within
    ``drafts`` tokens of ``max_model_len``; this proposer shortens such blocks itself.

    Raises:
        NLDError: the runner lacks an attribute that this relies on.
    """
    from vllm_nld.vllm_glue.rejection_sampler import accept_diffusion, draw_seeded, guide_verification
    from vllm_nld.vllm_glue.thinking_budget import force_ends_by_position

    for name in (
        "drafter",
        "rejection_sampler",
        "requests",
        "input_batch",
        "effective_drafter_max_model_len",
        "max_model_len",
        "_model_forward",
    ):
        if not hasattr(runner, name):
            raise NLDError(f"this vLLM's model runner has no {name!r}; vllm-nld supports vLLM {SUPPORTED}")
    _wrap_forward(runner)
    runner.effective_drafter_max_model_len = runner.max_model_len + drafts
    runner.drafter.attach(runner)
    if not hasattr(runner.rejection_sampler, "apply_logits_processors"):
        raise NLDError(f"this vLLM's rejection sampler changed; vllm-nld supports vLLM {SUPPORTED}")
    force_ends_by_position(runner.rejection_sampler.sampler, runner.drafter.forced_ends)
    accept_diffusion(runner.rejection_sampler, runner.drafter.is_diffusion)
    draw_seeded(runner.rejection_sampler, runner.drafter.noise_at, runner.drafter.seed_draws)
    guide_verification(runner.rejection_sampler, runner.drafter.draft_probs, runner.drafter.is_diffusion)


def _wrap_forward(runner: Any) -> None:
    """Have the proposer run the causal pass (vLLM: ``_model_forward`` "can be overridden by subclasses"); idempotent.

    vLLM passes all arguments by name. Warm-ups and profiling runs call the model itself.
    """
    original = runner._model_forward
    if getattr(original, "runs_branches", False):
        return

    def forward(**arguments: Any) -> Any:
        return runner.drafter.forward(original, arguments)

    forward.runs_branches = True  # type: ignore[attr-defined]
    runner._model_forward = forward
