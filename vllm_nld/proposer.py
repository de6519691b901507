"""The proposer behind ``--speculative-config '{"model": "vllm_nld.SelfSpeculation"}'``.

vLLM calls it after every step: the causal pass has just verified the last drafts (or finished a prefill), the cache
holds exactly the decided tokens but the last, and that last token seeds the next block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_nld import compat
from vllm_nld.draft_pass import DraftPass, DraftRequest
from vllm_nld.options import NLDOptions

logger = init_logger("vllm.nld.proposer")


class SelfSpeculation:
    """Drafts a block per request with the target model itself (spec'd by vLLM's ``custom_class`` interface).

    Attributes:
        block_length: seed plus drafts, in tokens.
        cycles: drafts handed out so far, one per request and step.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.vllm_config = vllm_config
        self.options = NLDOptions.from_vllm_config(vllm_config)
        self.block_length: int = 1 + vllm_config.speculative_config.num_speculative_tokens
        self.max_model_len: int = vllm_config.model_config.max_model_len
        self.eos_token_ids = _eos_token_ids(vllm_config.model_config.hf_config)
        self.draft_pass: DraftPass | None = None
        self.cycles = 0
        self._requests: _Requests | None = None
        if vllm_config.device_config.device_type == "cpu":
            compat.repair_cpu_temperature()

    def load_model(self, target_model: Any) -> None:
        """Take the loaded target: its weights are the draft's weights."""
        self.draft_pass = DraftPass(self.vllm_config, target_model, self.options.draft_threshold)
        logger.info(
            "Self-speculation is active: block length %d (1 seed + %d drafts), draft threshold %s",
            self.block_length,
            self.block_length - 1,
            self.options.draft_threshold,
        )

    def attach(self, runner: Any) -> None:
        """Let the proposer see the requests' sampling parameters and the final length limit (called by the worker)."""
        self.max_model_len = runner.max_model_len
        self._requests = _Requests(runner)

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray[Any, np.dtype[Any]],
        token_ids_cpu: np.ndarray[Any, np.dtype[Any]],
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Return the drafts of every batch row, an empty list where the next step is to be plain AR.

        Args:
            sampled_token_ids: per row, the tokens this step decided; empty while its prompt is being prefilled.
            num_tokens_no_spec: ``[rows]``, decided tokens per row, this step's included.
            token_ids_cpu: ``[rows, max_model_len]``, unused: the seed is the last sampled token.
            slot_mappings: unused: a draft pass writes nothing.
        """
        requests = []
        for row, sampled in enumerate(sampled_token_ids):
            decided = int(num_tokens_no_spec[row])
            length = self._length(row, sampled, decided)
            if length >= 2:
                requests.append(DraftRequest(row, sampled[-1], decided - 1, length))
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        if requests:
            assert self.draft_pass is not None, "vLLM calls load_model() before propose()"
            for request, tokens in zip(requests, self.draft_pass.run(requests), strict=True):
                drafts[request.row] = tokens
            self.cycles += len(requests)
        return drafts

    def _length(self, row: int, sampled: list[int], decided: int) -> int:
        """Tokens of the row's next block, seed included; below 2 there is nothing to draft."""
        if not sampled or not self.eos_token_ids.isdisjoint(sampled):
            return 0
        # The verify step runs the seed and the drafts, and vLLM keeps one position free for the token it yields.
        length = min(self.block_length, self.max_model_len - decided)
        if self._requests is not None:
            length = min(length, self._requests.remaining(row))
        return length


class _Requests:
    """Read-only view of the model runner's requests."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def remaining(self, row: int) -> int:
        """Tokens the row may generate next; a cycle that verifies n drafts generates at most n + 1.

        A cycle does not reach past ``min_tokens``: after accepted drafts vLLM 0.32 forbids the stop tokens in the bonus
        position by the number of tokens before the cycle, where AR would allow them.
        """
        request = self._runner.requests[self._runner.input_batch.req_ids[row]]
        params = request.sampling_params
        if params is None:
            return int(self._runner.max_model_len)
        generated = len(request.output_token_ids)
        limit = self._runner.max_model_len if params.max_tokens is None else params.max_tokens - generated
        return int(min(limit, params.min_tokens - generated) if generated < params.min_tokens else limit)


def _eos_token_ids(config: Any) -> frozenset[int]:
    """A request whose model said end-of-sequence is over (or ignores it, which costs one plain step)."""
    eos: int | Mapping[int, Any] | list[int] | None = config.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos]) if isinstance(eos, int) else frozenset(eos)
