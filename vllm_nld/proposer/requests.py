"""The states of all requests, and what of them belongs to the batch rather than to one request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vllm_nld.draft_sources import SOURCES, DraftSource
from vllm_nld.draft_sources.acceptance import Prior
from vllm_nld.draft_sources.base import NewRequest
from vllm_nld.ops.noise import Noise
from vllm_nld.options import SPECULATIVE, NLDOptions
from vllm_nld.proposer.request_state import RequestState
from vllm_nld.proposer.thinking import ThinkingBudget
from vllm_nld.serving.admission import EngineTraits, request_options


class Requests:
    """The states of all requests that the model runner knows.

    Args:
        runner: vLLM's model runner; read only.
        traits: what the engine offers.
        thinking: start and end token ids of the reasoning parser, if there is one.
    """

    def __init__(self, runner: Any, traits: EngineTraits, thinking: tuple[list[int], list[int]] | None) -> None:
        self._runner = runner
        self._traits = traits
        self._thinking = thinking
        self._states: dict[str, RequestState] = {}
        self._greedy, self._sampled, self._seeded = Prior(), Prior(), Prior()

    @property
    def rows(self) -> int:
        """Rows of the batch that hold a request."""
        return len(self._runner.input_batch.req_ids)

    def at(self, row: int) -> RequestState:
        """Return the state of the request in a batch row."""
        return self.state(self._runner.input_batch.req_ids[row])

    def state(self, request_id: str) -> RequestState:
        """Return a request's state; it is made when the request is first asked for."""
        state = self._states.get(request_id)
        cached = self._runner.requests[request_id]
        if state is None or state.cached is not cached:
            options = request_options(cached.sampling_params, self._traits)
            prior = self._prior(cached.sampling_params)
            state = RequestState(
                request_id,
                cached,
                options,
                prior,
                self._runner.sampler.topk_topp_sampler,
                self._budget(cached.sampling_params),
                self._sources(options, prior, cached),
            )
            self._states[request_id] = state
        return state

    def _prior(self, params: Any) -> Prior:
        """Return what to expect of a request by the rule that accepts its drafts."""
        if params.temperature == 0:
            return self._greedy
        return self._sampled if params.seed is None else self._seeded

    def branching(self, scheduled: Mapping[str, int]) -> dict[int, RequestState]:
        """Return the states of a step's requests for which branches are planned, by batch row."""
        rows = self._runner.input_batch.req_id_to_index
        planned = {name: state for name in scheduled if (state := self._states.get(name)) and state.pending}
        return {rows[name]: state for name, state in planned.items() if name in rows}

    def is_diffusion(self, row: int) -> bool:
        """Whether the request in a batch row decodes by diffusion; vLLM's warm-up samples rows without requests."""
        return row < self.rows and self.at(row).is_diffusion

    def draft_probs(self, drafts: Sequence[int]) -> list[Tensor | None]:
        """Return what each row's drafts were drawn from, float32 ``[drafts, vocab]``; None if they were not drawn.

        Args:
            drafts: how many drafts each row verifies.
        """
        rows = self.rows
        return [self.at(row).draft_probs if count and row < rows else None for row, count in enumerate(drafts)]

    def noise_at(self, row: int) -> tuple[Noise, int] | None:
        """Return a seeded row's random numbers, and the position of the first token that the step decides.

        None for rows whose causal draws are not seeded, and vLLM's warm-up's, which are no requests.
        """
        if row >= self.rows or not (state := self.at(row)).is_seeded:
            return None
        return state.noise, int(self._runner.input_batch.num_tokens_no_spec[row])

    def forced_ends(self, row: int, drafts: Sequence[int]) -> Sequence[int | None]:
        """Return what a row's thinking budget forces: see :meth:`ThinkingBudget.forced`.

        Empty without a budget, and for rows without requests, which vLLM keeps drafts of.
        """
        if row >= self.rows or (state := self.at(row)).thinking is None:
            return ()
        return state.thinking.forced(state.cached.prompt_token_ids or [], state.cached.output_token_ids, drafts)

    def seed_draws(self, drafted: Mapping[str, Sequence[int]]) -> None:
        """Seed vLLM's generators for what the step draws last in each row: after its drafts, if it has any.

        Args:
            drafted: the drafts that it verifies, by request.
        """
        batch = self._runner.input_batch
        for row, generator in batch.generators.items():
            found = self.noise_at(row)
            if found is not None:
                noise, position = found
                generator.manual_seed(noise.key(position + len(drafted.get(batch.req_ids[row], ()))))

    def _sources(self, options: NLDOptions, prior: Prior, cached: Any) -> tuple[DraftSource, ...]:
        """Open the draft sources of a request that is in a mode with drafts."""
        if options.mode not in SPECULATIVE:
            return ()
        config = self._runner.model_config.hf_config
        never = frozenset((config.mask_token_id, *config.image_token_ids))
        found = []
        for source in SOURCES:
            values = {own.name: getattr(options, own.name) for own in source.options}
            opened = source.open(NewRequest(values, prior, cached.prompt_token_ids is not None, never))
            if opened is not None:
                found.append(opened)
        return tuple(found)

    def _budget(self, params: Any) -> ThinkingBudget | None:
        limit = getattr(params, "thinking_token_budget", None)
        if limit is None or limit < 0 or self._thinking is None:
            return None
        return ThinkingBudget(limit, *self._thinking)

    def drop_drafts(self, request_id: str) -> None:
        """Forget what belongs to a request's drafts: it was preempted, and they are never verified."""
        if request_id in self._states:
            self._states[request_id].draft_probs = None
            self._states[request_id].pending = None

    def finish(self, request_id: str) -> RequestState | None:
        """Forget a request and return its last state, if it was ever asked for."""
        state = self._states.pop(request_id, None)
        if state is not None:
            state.close()
        return state
