"""How drafts are verified on vLLM's second runner.

The verifier's own token of a position is what AR would decide there: the best one, or, for a request with a
temperature, the one that vLLM draws by the noise of the request's seed and the position. A draft that is this token is
accepted, and whatever the drafts are, the text is that of AR with this seed, token for token. Drafts drawn with the
same noise are often that token. Where the distribution that drafts were drawn from is kept, and no seed was asked for,
vLLM's rejection sampler accepts more of them: it promises the distribution of AR.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_nld.speculator import kernels
from vllm_nld.speculator.speculator import Speculator
from vllm_nld.vllm_glue import second_runner

_in_charge: list[NLDRejectionSampler] = []
"""The sampler whose step is being verified: vLLM does not pass it to the function that calls :func:`verify`."""


class NLDSampler(Sampler):  # type: ignore[misc]
    """vLLM's, for steps without drafts: also there, rows of diffusion get the next token of their block.

    Such steps have more requests than places for drafts.

    Args:
        sampler: vLLM's, whose state is shared.
        speculator: the engine's.
    """

    def __init__(self, sampler: Sampler, speculator: Speculator) -> None:
        self.__dict__.update(vars(sampler))
        self.speculator = speculator
        self._indices: Any = None

    def __call__(self, logits: Tensor, input_batch: Any) -> Any:
        """Sample a token for every row, as vLLM does."""
        self._indices = input_batch.idx_mapping_np
        return super().__call__(logits, input_batch)

    def sample(self, logits: Tensor, requests: Tensor, *others: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Return each row's token, int64 ``[rows]``, and the logits that it was drawn from.

        Args:
            logits: ``[rows, vocab]``.
            requests: int64 ``[rows]``, each row's request.
            others: vLLM's, as ``named``.
        """
        sampled, processed = super().sample(logits, requests, *others, **named)
        table = self.speculator.table
        if table.denoises(self._indices).any():
            is_next = (table.on_device[1][requests] == kernels.COMMIT) & (self.speculator.buffers.valid[requests] > 0)
            sampled = torch.where(is_next, self.speculator.last_drafts[requests, 0], sampled)
        return sampled, processed


class NLDRejectionSampler(RejectionSampler):  # type: ignore[misc]
    """vLLM's, which verifies by :func:`verify` what must be verified exactly."""

    def __init__(self, sampler: Any, speculative_config: Any, device: torch.device, speculator: Speculator) -> None:
        super().__init__(sampler, speculative_config, device)
        self.speculator = speculator
        self._indices: Any = None

    def __call__(self, logits: Tensor, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Verify a step's drafts, as vLLM does."""
        self._indices = input_batch.idx_mapping_np
        _in_charge.append(self)
        try:
            return super().__call__(logits, input_batch, *args, **kwargs)
        finally:
            _in_charge.pop()

    def verify(
        self, original: Callable[[dict[str, Any]], tuple[Tensor, Tensor]], given: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return each row's tokens, int64 ``[rows, steps + 1]``, and how many there are, int32 ``[rows]``.

        Args:
            original: vLLM's rejection sampler.
            given: its arguments by name.
        """
        table, valid = self.speculator.table, self.speculator.buffers.valid
        rows = len(given["cu_num_logits"]) - 1
        rejections = table.rejections(self._indices)
        if rejections:
            # After a request's drafts come places that hold no draft.
            is_filling = given["expanded_local_pos"] > valid[given["expanded_idx_mapping"]]
            drafts = given["draft_sampled"].masked_fill(is_filling, -1)
            sampled, counts = original(given | {"draft_sampled": drafts})
            if not table.exactly(self._indices):
                return sampled, counts
        else:
            sampled = given["draft_sampled"].new_empty(rows, given["num_speculative_steps"] + 1, dtype=torch.int64)
            counts = given["cu_num_logits"].new_empty(rows)
        targets = self._targets(given)
        handed = self.speculator.last_drafts
        kernels.accept_kernel[(rows,)](
            sampled, sampled.stride(0), counts, given["draft_sampled"], targets, given["cu_num_logits"],
            given["idx_mapping"], table.on_device[1], valid, handed, handed.stride(0), EVERY=not rejections,
        )  # fmt: skip
        return sampled, counts

    def _targets(self, given: dict[str, Any]) -> Tensor:
        """Return the verifier's own tokens, int64 ``[logits]``; where all are the best ones, by one kernel, not three.

        Equal logits fall to the lowest token in either way.
        """
        logits: Tensor = given["target_logits"]
        if not self.speculator.table.random[self._indices].any():
            return logits.argmax(-1)
        return second_runner.draw(
            logits,
            given["expanded_idx_mapping"],
            given["temperature"],
            given["seed"],
            given["pos"],
            tempered=True,
            fp64=self.sampler.use_fp64_gumbel,
        )


def verify(original: Callable[[dict[str, Any]], Any], given: dict[str, Any]) -> Any:
    """Verify a step of self-speculation; None for any other."""
    return _in_charge[-1].verify(original, given) if _in_charge else None
