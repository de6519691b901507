"""vLLM's scheduler, whose steps suit blocks: parked requests are left out, nothing is padded, and all get a share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from vllm_nld.draft_pass.memory import DRAWN_BYTES, rows_in
from vllm_nld.proposer.parking import SchedulerNote, WorkerNote
from vllm_nld.serving.admission import EngineTraits, request_options
from vllm_nld.vllm_glue import sampling, scheduling, steps
from vllm_nld.vllm_glue.padding import schedule_unpadded
from vllm_nld.vllm_glue.reports import attach


def fair_shares(wanted: Sequence[int], budget: int) -> list[int]:
    """Return what each one gets of a budget: what it wants, but none more than one that does not get all it wants."""
    shares = [0] * len(wanted)
    by_size = sorted(range(len(wanted)), key=wanted.__getitem__)
    for position, index in enumerate(by_size):
        shares[index] = min(wanted[index], budget // (len(wanted) - position))
        budget -= shares[index]
    return shares


class NLDScheduler(Scheduler):  # type: ignore[misc]
    """vLLM's scheduler with other steps; what it plans is what worker, grammar and sampler see.

    Parked requests are skipped; to vLLM they keep running, so they hold their cache pages and may be preempted.

    vLLM gives the budget of a step away in the order of arrival, so full blocks of the first requests would leave the
    others out for as long as those run. Here drafts are cut before, to fair shares. How many drafts are verified must
    not depend on what was drawn: it depends on their numbers, as those do on prefixes, and on the other requests.

    Attributes:
        parked: ids of the requests that the worker has parked, after its last step.
        schedules_blocks: tells the proposer, which never imports this class.
    """

    schedules_blocks = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parked: frozenset[str] = frozenset()
        self._drafters: set[str] = set()
        self._traits = EngineTraits.of(self.vllm_config)
        self._argmax: dict[str, bool] = {}

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule a step, as vLLM does, without the parked requests. It may be empty: then the worker denoises."""
        for request in self.running:
            if request.request_id in self.parked:
                scheduling.skip_in_next_step(self, request)
        share = self._share_budget()
        output = schedule_unpadded(self, lambda: super(NLDScheduler, self).schedule(*args, **kwargs))
        return steps.with_note(output, SchedulerNote(self._others_wait(output.num_scheduled_tokens), share))

    def _share_budget(self) -> int:
        """Cut drafts to fair shares of the step's budget; return the block length that fits every request in the next.

        The first waiting request counts as well, if there is a place for it: else it would wait until another ends.
        """
        running = [request for request in self.running if request.request_id not in self.parked]
        wanted = [request.num_tokens_with_spec - request.num_computed_tokens for request in running]
        if self._has_place():
            wanted.append(self.waiting.peek_request().num_tokens)
        budget = int(self.max_num_scheduled_tokens)
        large = len(wanted) - len(running)
        # The last share may be a waiting request's, which takes what is left.
        for request, tokens, share in zip(running, wanted, fair_shares(wanted, budget), strict=False):
            if request.spec_token_ids:
                self._drafters.add(request.request_id)
            large += tokens > 1 or request.request_id in self._drafters
            decided = request.num_tokens - request.num_computed_tokens
            request.spec_token_ids = request.spec_token_ids[: max(0, share - decided)]
        self._limit_rows(running)
        self._drafters &= self.requests.keys()
        return max(1, (budget - (len(wanted) - large)) // max(1, large))

    def _limit_rows(self, running: Sequence[Any]) -> None:
        """Cut drafts to what memory allows where their verification holds copies of their logits.

        The proposer limits them already, but by the step before: a waiting request may change what the whole batch
        needs, and the blocks of diffusion have no limit there.
        """
        rows = rows_in(DRAWN_BYTES, self.vllm_config.model_config.get_vocab_size())
        drafts = [len(request.spec_token_ids) for request in running]
        if sum(drafts) <= rows:
            return
        if all(map(self._decides_by_argmax, [*running, *islice(self.waiting, self._places())])):
            return
        for request, share in zip(running, fair_shares(drafts, rows), strict=True):
            request.spec_token_ids = request.spec_token_ids[:share]

    def _decides_by_argmax(self, request: Any) -> bool:
        known = self._argmax.get(request.request_id)
        if known is None:
            params = request.sampling_params
            known = sampling.always_decides_by_argmax(params)
            known = known and request_options(params, self._traits).mode != "diffusion"
            self._argmax = {name: value for name, value in self._argmax.items() if name in self.requests}
            self._argmax[request.request_id] = known
        return known

    def _has_place(self) -> bool:
        return bool(self.waiting) and self._places() > 0

    def _places(self) -> int:
        """Return how many waiting requests vLLM would take in now; newer versions have a limit of their own for it."""
        most: int = getattr(self, "max_num_active_reqs", None) or self.max_num_running_reqs
        return max(0, most - len(self.running))

    def _others_wait(self, scheduled: dict[str, int]) -> bool:
        if self._has_place():
            return True
        left_out = (request.request_id for request in self.running if request.request_id not in scheduled)
        return any(request_id not in self.parked for request_id in left_out)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Take a step's tokens in, as vLLM does, and what the worker says of blocks.

        vLLM asks for drafts only after a step that had tokens, so those of a block that became done otherwise are here.
        """
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        note = steps.note_on(model_runner_output)
        if isinstance(note, WorkerNote):
            self.parked = note.parked
            attach(outputs, note.reports)
            if note.finished:
                self.update_draft_token_ids(steps.draft_token_ids(note.finished))
        return outputs


ParkingScheduler = NLDScheduler
"""The old name, which ``--scheduler-cls`` may hold for one more release."""
