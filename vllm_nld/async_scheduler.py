"""Schedulers for vLLM's second model runner, asynchronous and not: each request gets as many drafts as it asks for.

There the scheduler plans a step before the tokens of the one before are known. So it does not get drafts, it grants
places for them; how many follows from a request's options, and, in auto mode, from what pays with so many requests
(:mod:`vllm_nld.auto.trials`). It learns what became of them when the tokens come, one step later, and that is where
they are counted.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from vllm_nld.auto.trials import Trials
from vllm_nld.scheduler import NLDScheduler, fair_shares
from vllm_nld.serving.admission import request_options
from vllm_nld.serving.ledger import Ledger, Plan, Tally
from vllm_nld.serving.second_reports import SecondReports
from vllm_nld.vllm_glue import steps
from vllm_nld.vllm_glue.forced_preemption import StepsInFlight
from vllm_nld.vllm_glue.padding import schedule_unpadded
from vllm_nld.vllm_glue.reports import attach
from vllm_nld.vllm_glue.second_runner import block_length


class NLDSecondScheduler(NLDScheduler):
    """vLLM's scheduler, synchronous, with as many places for drafts as requests ask for.

    Attributes:
        ledger: what was done so far.
        reports: of the requests that want one.
        trials: whether drafting pays, for requests in auto mode.
        decisions: of auto mode, by what was done and the tokens of a block.
        grants_places: tells other modules, which never import this class, that it is for the second runner.
    """

    grants_places = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ledger, self.trials = Ledger(), Trials()
        self.reports = SecondReports(lambda request: request_options(request.sampling_params, self._traits))
        self.decisions: Counter[tuple[str, int]] = Counter()
        self._auto_drafts = True
        self._modes: dict[str, tuple[str, int]] = {}

    def _asked(self, request: Any) -> tuple[str, int]:
        """Return a request's mode, and how many drafts it wants in a step."""
        known = self._modes.get(request.request_id)
        if known is None:
            options = request_options(request.sampling_params, self._traits)
            known = options.mode, block_length(options, request.sampling_params, self._traits.block_length) - 1
            self._modes = {name: value for name, value in self._modes.items() if name in self.requests}
            self._modes[request.request_id] = known
        return known

    def _next_drafts(self, request: Any) -> int:
        """Return how many drafts a request gets in the step after the one that is being planned."""
        mode, drafts = self._asked(request)
        return drafts if mode != "auto" or self._auto_drafts else 0

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule a step, as vLLM does; a request with one token to compute is not padded to a block."""
        self._cut_to_shares()
        requests = len(self.running)
        self._auto_drafts = self.trials.drafts(requests)
        output = schedule_unpadded(self, lambda: super(NLDScheduler, self).schedule(*args, **kwargs))
        return steps.with_note(output, Plan(self.ledger.total, self.decisions, self._auto_drafts, requests))

    def _cut_to_shares(self) -> None:
        """Cut drafts to fair shares of the step's budget, which vLLM would give away in order of arrival."""
        running = self.running
        wanted = [
            request.num_tokens_with_spec + request.num_output_placeholders - request.num_computed_tokens
            for request in running
        ]
        if self._has_place():
            wanted.append(self.waiting.peek_request().num_tokens)
        budget = int(self.max_num_scheduled_tokens)
        if sum(wanted) <= budget:
            return
        for request, tokens, share in zip(running, wanted, fair_shares(wanted, budget), strict=False):
            drafts = len(request.spec_token_ids)
            request.spec_token_ids = request.spec_token_ids[: max(0, drafts - (tokens - share))]

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        """Take drafts in, as vLLM does; the runner returns the same number for every request."""
        for index, name in enumerate(draft_token_ids.req_ids):
            request = self.requests.get(name)
            if request is not None:
                del draft_token_ids.draft_token_ids[index][self._next_drafts(request) :]
        super().update_draft_token_ids(draft_token_ids)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Take a step's tokens in, as vLLM does, and count what became of the drafts."""
        self._count(scheduler_output, model_runner_output)
        outputs = super(NLDScheduler, self).update_from_output(scheduler_output, model_runner_output)
        attach(outputs, self.reports.take(self.requests))
        return outputs

    def _count(self, planned: Any, result: Any) -> None:
        """Count what a step did for its requests, and whether it says how well its way pays."""
        note = steps.note_on(planned)
        ways, yielded = set(), 0
        for name in planned.num_scheduled_tokens:
            request = self.requests.get(name)
            tokens = self._tokens_of(result, name)
            if request is None or tokens == 0:
                ways.add("other")  # it ended, or is at its prompt
                continue
            drafts = len(planned.scheduled_spec_decode_tokens.get(name, ()))
            prefill = planned.num_scheduled_tokens[name] - drafts > 1 or request.num_output_tokens == 0
            mode, asked = self._asked(request)
            self._count_one(mode, tokens, drafts, prefill)
            self.reports.saw(request, mode, tokens, drafts, prefill, drafts < asked)
            if mode == "self_speculation" or (mode == "auto" and note.auto_drafts):
                self.ledger.drafted(Tally(), 1)
            yielded += tokens
            ways.add("other" if prefill or mode != "auto" else "self_speculation" if drafts else "ar")
            if mode == "auto" and not prefill:
                self.decisions["self_speculation" if drafts else "ar", drafts + 1] += 1
        self.trials.saw(
            note.requests, ways == {"self_speculation"}, yielded,
            comparable=ways in ({"self_speculation"}, {"ar"}),
        )  # fmt: skip

    @staticmethod
    def _tokens_of(result: Any, name: str) -> int:
        """Return how many tokens a step yielded for a request."""
        sampled = result.sampled_token_ids
        return len(sampled[result.req_id_to_index[name]]) if sampled else 0

    def _count_one(self, mode: str, tokens: int, drafts: int, prefill: bool) -> None:
        """Count the causal pass of a request that got tokens from it."""
        kind, own = ("verify", "self_speculation") if drafts else ("ar", "ar")
        if mode == "diffusion":
            kind, own = "prefill" if prefill else "commit", "diffusion"
        elif prefill:
            kind = "prefill"
            own = "ar" if mode == "ar" else "self_speculation"
        elif mode == "self_speculation":
            own = mode  # also without drafts, at the end of its room
        self.ledger.causal(Tally(), kind, own, tokens, tokens - 1)


class NLDAsyncScheduler(NLDSecondScheduler, AsyncScheduler):  # type: ignore[misc]
    """:class:`NLDSecondScheduler` for asynchronous scheduling."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_flight = StepsInFlight()

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        """Grant places for the drafts that the step's requests are going to have, as vLLM does for all alike.

        vLLM calls this once for every step, and :meth:`update_from_output` once for its result, in the same order.
        """
        super()._update_after_schedule(scheduler_output)
        yielding = [name for name in scheduler_output.num_scheduled_tokens if not self.requests[name].is_prefill_chunk]
        for name in yielding:
            request = self.requests[name]
            request.spec_token_ids = [-1] * self._next_drafts(request)
        self._in_flight.planned(yielding)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Take the oldest step's tokens in, as vLLM does."""
        self._in_flight.came()
        return super().update_from_output(scheduler_output, model_runner_output)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Reset the prefix cache, as vLLM does; if that preempts requests, no later step's tokens are dropped."""
        running = list(self.running)
        done: bool = super().reset_prefix_cache(reset_running_requests, reset_connector)
        if reset_running_requests:
            self._in_flight.correct(running)
        return done
