"""vLLM's scheduler, which leaves requests out of a causal pass while their diffusion block is being denoised."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from vllm_nld import compat
from vllm_nld.parking import SchedulerNote, WorkerNote


class ParkingScheduler(Scheduler):  # type: ignore[misc]
    """Skips parked requests; to vLLM they keep running, so they hold their cache pages and may be preempted.

    Attributes:
        parked: ids of the requests that the worker has parked, after its last step.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parked: frozenset[str] = frozenset()

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule a step, as vLLM does, without the parked requests. It may be empty: then the worker denoises."""
        for request in self.running:
            if request.request_id in self.parked:
                compat.skip_in_next_step(self, request)
        output = super().schedule(*args, **kwargs)
        return compat.with_note(output, SchedulerNote(self._others_wait(output.num_scheduled_tokens)))

    def _others_wait(self, scheduled: dict[str, int]) -> bool:
        if self.waiting and len(self.running) < self.max_num_running_reqs:
            return True
        left_out = (request.request_id for request in self.running if request.request_id not in scheduled)
        return any(request_id not in self.parked for request_id in left_out)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Take a step's tokens in, as vLLM does, and what the worker says of blocks.

        vLLM asks for drafts only after a step that had tokens, so those of a block that became done otherwise are here.
        """
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        note = compat.note_on(model_runner_output)
        if isinstance(note, WorkerNote):
            self.parked = note.parked
            if note.finished:
                self.update_draft_token_ids(compat.draft_token_ids(note.finished))
        return outputs
