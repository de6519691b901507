"""What requests ask for, by their index in vLLM's tables: on the host for planning, on the device for kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_nld.branches.places import usual_length
from vllm_nld.options import MOST_BRANCHES, NLDOptions
from vllm_nld.serving.admission import LONGEST_BRANCH, EngineTraits, request_options
from vllm_nld.speculator.branch_kernels import ALL
from vllm_nld.speculator.kernels import COMMIT, EXACT, REJECTION
from vllm_nld.vllm_glue.second_runner import block_length

Numbers = np.ndarray[Any, np.dtype[Any]]


class RequestTable:
    """One entry per request that the runner knows; vLLM gives indices to new requests again.

    Attributes:
        lengths: int32, tokens of the next block, seed included; 1: nothing is drafted.
        kinds: int32, how drafts are verified (:mod:`vllm_nld.speculator.kernels`).
        adapters: int32, whether drafts run with the draft adapter.
        random: bool, on the host only: whether its tokens are drawn, by its temperature; else they are the best ones.
        drawn: bool, on the host only: whether drafts are drawn, too.
        auto: bool, on the host only: whether it is in auto mode, which drafts where that pays.
        branch_counts: int32, branches of a verify forward; 0: none, :data:`ALL`: one after every token.
        offered: bool, on the host only: whether the device may still count drafts of the last step as valid.

    Args:
        requests: how many there can be.
        traits: what the engine offers.
        rejects: whether drafts of unseeded requests may be verified by rejection sampling.
    """

    def __init__(self, requests: int, traits: EngineTraits, rejects: bool) -> None:
        import torch
        from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor

        self._traits, self._rejects = traits, rejects
        self._tables = [UvaBackedTensor(requests, dtype=torch.int32) for _ in range(6)]
        self.branch_counts: Numbers = self._tables[3].np
        self.random: Numbers = np.zeros(requests, dtype=bool)
        self.drawn: Numbers = np.zeros(requests, dtype=bool)
        self.auto: Numbers = np.zeros(requests, dtype=bool)
        self.offered: Numbers = np.zeros(requests, dtype=bool)
        self._new: list[int] = []
        self._lengths.np.fill(1)
        self._kinds.np.fill(EXACT)
        self.upload()

    @property
    def _lengths(self) -> Any:
        return self._tables[0]

    @property
    def _kinds(self) -> Any:
        return self._tables[1]

    def add(self, index: int, params: Any) -> NLDOptions:
        """Record and return a request's options. A preempted one comes again; vLLM's warm-up also adds requests."""
        options = request_options(params, self._traits)
        self._lengths.np[index] = block_length(options, params, self._traits.block_length)
        self._kinds.np[index] = self._kind(options, params)
        self._tables[2].np[index] = options.draft_adapter
        count, length = branches_of(options, self._lengths.np[index])
        self._tables[3].np[index], self._tables[4].np[index], self._tables[5].np[index] = count, length, count > 0
        self.auto[index] = options.mode == "auto"
        self.random[index] = params.temperature > 0
        self.drawn[index] = self.random[index] and options.sampled_drafts
        self.offered[index] = False
        self._new.append(index)
        return options

    def _kind(self, options: NLDOptions, params: Any) -> int:
        """Return how a request's drafts are verified.

        A draft may be anything where it has to be the token that the verifier draws by itself, with the noise of seed
        and position. That is how seeds are kept, and it also serves drafts that were not drawn. Under a grammar some
        drafts are never judged. Which ones depends on their tokens, which would bias rejection sampling.
        """
        if options.mode == "diffusion":
            return COMMIT
        if params.temperature == 0 or params.seed is not None or params.structured_outputs is not None:
            return EXACT
        return REJECTION if self._rejects and options.sampled_drafts else EXACT

    def denoises(self, indices: Numbers) -> Numbers:
        """Return bool per request: whether it decodes by diffusion."""
        mask: Numbers = self._kinds.np[indices] == COMMIT
        return mask

    def upload(self) -> list[int]:
        """Bring the tables to the device, without waiting for it; return the requests added since the last time."""
        for table in self._tables:
            table.copy_to_uva()
        new, self._new = self._new, []
        return new

    def drafts(self, indices: Numbers, auto_drafts: bool) -> Numbers:
        """Return bool per request: whether it drafts, by self-speculation, or in auto mode if ``auto_drafts``."""
        mask: Numbers = (self._lengths.np[indices] > 1) & (self._kinds.np[indices] != COMMIT)
        if not auto_drafts:
            mask &= ~self.auto[indices]
        return mask

    def lengths(self, indices: Numbers) -> tuple[int, bool]:
        """Return the longest block among requests, of which there must be one, in tokens; and whether all are equal."""
        lengths = self._lengths.np[indices]
        return int(lengths.max()), bool((lengths == lengths[0]).all())

    def rejections(self, indices: Numbers) -> bool:
        """Whether the drafts of one of these requests are verified by rejection sampling."""
        return bool((self._kinds.np[indices] == REJECTION).any())

    def exactly(self, indices: Numbers) -> bool:
        """Whether the drafts of one of these requests are verified in another way."""
        return bool((self._kinds.np[indices] != REJECTION).any())

    @property
    def on_device(self) -> tuple[Any, Any, Any]:
        """Lengths, kinds and adapters, int32 ``[requests]`` each; other tensors after each upload."""
        lengths, kinds, adapters = (table.gpu for table in self._tables[:3])
        return lengths, kinds, adapters

    def branching(self, indices: Numbers) -> Numbers:
        """Return bool per request: whether its verify forwards branch."""
        mask: Numbers = self.branch_counts[indices] != 0
        return mask

    def branches(self, indices: Numbers) -> tuple[int, int]:
        """Return the most branches of one of these requests, and the tokens of the longest; all must branch."""
        counts, lengths = self.branch_counts[indices], self._tables[4].np[indices]
        counts = np.where(counts == ALL, np.minimum(self._lengths.np[indices], MOST_BRANCHES), counts)
        return int(counts.max()), int((lengths + self._tables[5].np[indices]).max())

    @property
    def branches_on_device(self) -> tuple[Any, Any, Any]:
        """Numbers of branches, tokens of one, and whether they look past their block; int32 ``[requests]`` each."""
        counts, lengths, looks_past = (table.gpu for table in self._tables[3:])
        return counts, lengths, looks_past


def branches_of(options: NLDOptions, block_length: int) -> tuple[int, int]:
    """Return the branches of a request's verify forwards, and the tokens of each; no branches: 0 and 0.

    Args:
        options: the request's.
        block_length: tokens of its blocks, seed included; 1: it decodes without drafts.
    """
    if options.mode not in ("auto", "self_speculation") or options.branches == "off" or block_length < 2:
        return 0, 0
    length = min(usual_length(options.branches, options.branch_length, block_length), LONGEST_BRANCH)
    return (ALL if options.branches == "all" else int(options.branches)), length


def default_branches(options: NLDOptions, block_length: int) -> tuple[int, int] | None:
    """Return the branches of a request without options of its own, and the tokens of one with what looks past it."""
    count, length = branches_of(options, block_length)
    if count == 0:
        return None
    return (min(block_length, MOST_BRANCHES), length) if count == ALL else (count, length + 1)
