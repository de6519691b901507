"""What a causal pass runs, and what it says about each request once it has decided its tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm_nld.origins import AR, BONUS, CORRECTED, DENOISED, SEED
from vllm_nld.proposer.diffusion import Phase
from vllm_nld.proposer.parking import SchedulerNote
from vllm_nld.proposer.request_state import RequestState
from vllm_nld.serving.ledger import Ledger
from vllm_nld.vllm_glue import steps

_COMMITTING = Phase.COMMITTING  # slow to look up, in Python 3.11


@dataclass(frozen=True)
class CausalStep:
    """One causal pass.

    Attributes:
        scheduled: tokens by request.
        drafted: of them, the drafts that it verifies or commits.
        others_wait: whether requests that it leaves out, other than parked ones, may be in the next.
        share: tokens of the longest block for which the next step is likely to have room in every request; None: any.
    """

    scheduled: dict[str, int] = field(default_factory=dict)
    drafted: dict[str, list[int]] = field(default_factory=dict)
    others_wait: bool = False
    share: int | None = None

    @classmethod
    def of(cls, scheduler_output: Any) -> CausalStep:
        """Read it from vLLM's ``SchedulerOutput`` and the note on it."""
        note = steps.note_on(scheduler_output)
        known = note if isinstance(note, SchedulerNote) else SchedulerNote()
        return cls(
            scheduler_output.num_scheduled_tokens,
            scheduler_output.scheduled_spec_decode_tokens,
            known.others_wait,
            known.share,
        )

    def is_prefill(self, state: RequestState) -> bool:
        """Whether it computed more of a request than decoding needs: a prompt, or a resumption."""
        own = self.scheduled.get(state.request_id, 0) - len(self.drafted.get(state.request_id, ()))
        return own > 1 or state.cached.num_computed_tokens < state.cached.num_prompt_tokens

    def tokens(self, states: dict[int, RequestState]) -> int:
        """Return the tokens that it ran for some requests."""
        return sum(self.scheduled.get(state.request_id, 0) for state in states.values())

    def record(self, state: RequestState, decided: int, prefill: bool, ledger: Ledger) -> None:
        """Record for a request that so many of its tokens are decided now."""
        state.draft_probs = None
        drafts = len(self.drafted.get(state.request_id, ()))
        if state.is_diffusion:
            kind, mode = "commit", "diffusion"
            if state.diffusion.phase is _COMMITTING:
                state.diffusion.committed(drafts)
        elif drafts:
            kind, mode = "verify", "self_speculation"
            state.learn(drafts, decided - 1)
        else:
            kind = "ar"
            mode = "self_speculation" if state.options.mode == "self_speculation" and prefill else "ar"
        if state.options.report:
            state.note_origins(_origins(state, decided, drafts))
        ledger.causal(state.tally, "prefill" if prefill else kind, mode, decided, decided - 1)


def _origins(state: RequestState, decided: int, drafts: int) -> str:
    """Return how the tokens came that a causal pass decided, given how many drafts it verified."""
    if state.is_diffusion:
        return DENOISED * (decided - 1) + SEED
    if not drafts:
        return AR * decided
    return state.origins_of_drafts(decided - 1) + (BONUS if decided > drafts else CORRECTED)
