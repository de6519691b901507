"""Block diffusion on vLLM's second runner: blocks are filled between two causal passes.

This is where the host waits for the device: every denoising forward is judged there, as on the first runner. It happens
only in steps that have such requests, and the requests of a step are denoised together.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vllm_nld.attention.backend import page_layout
from vllm_nld.draft_pass.block import Block, CommitRule
from vllm_nld.draft_pass.forward import DraftPass
from vllm_nld.draft_pass.token_choice import TokenChoice
from vllm_nld.ops.noise import Noise
from vllm_nld.options import NLDOptions
from vllm_nld.serving.ledger import Ledger, Tally


@dataclass
class Diffusing:
    """One request that decodes by diffusion.

    Attributes:
        name: vLLM's internal id.
        params: vLLM's ``SamplingParams``.
        options: the request's options.
        prompt: tokens of the prompt.
        handed: tokens of a block that the next causal pass was given to commit.
        has_ended: whether a stop token is committed. The scheduler learns of it later, so steps may follow.
    """

    name: str
    params: Any
    options: NLDOptions
    prompt: int
    handed: list[int] = field(default_factory=list)
    has_ended: bool = False

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end the request."""
        eos, own = self.params.eos_token_id, frozenset(self.params.stop_token_ids or ())
        return own if eos is None or self.params.ignore_eos else own | {eos}

    def after(self, committed: int, offered: int) -> list[int] | None:
        """Return what is left of a block of which a causal pass had no room for all; None if it is committed.

        Nothing may be left, if the pass decided the block's last token. The seed of the next block is yet to come then.

        Args:
            committed: drafts that the pass has accepted.
            offered: drafts that it had room for; the token after them was also of the block.
        """
        return self.handed[offered + 1 :] if committed == offered < len(self.handed) else None


class Diffusion:
    """Fills the blocks of a step's diffusion requests.

    Args:
        vllm_config: vLLM's.
        model: the target.
        longest: tokens of the longest block, seed included.
        max_model_len: tokens of the longest text.
        learned_sampler: the checkpoint's, if it brings one.

    Attributes:
        ledger: denoising forwards and blocks so far.
    """

    def __init__(
        self, vllm_config: Any, model: Any, longest: int, max_model_len: int, learned_sampler: Any = None
    ) -> None:
        from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

        self._pass = DraftPass(vllm_config, model, learned_sampler)
        self._longest, self._max_model_len = longest, max_model_len
        self._vocab_size: int = vllm_config.model_config.get_vocab_size()
        self._mask: int = vllm_config.model_config.hf_config.mask_token_id
        self._sampler = TopKTopPSampler()
        self._requests: dict[int, Diffusing] = {}
        self.ledger = Ledger()

    @property
    def forwards(self) -> int:
        """Denoising forwards so far."""
        return self._pass.forwards

    def add(self, index: int, request: Diffusing) -> None:
        """Take in a request; a preempted one comes again, and continues after what it has committed."""
        self._requests[index] = request

    def propose(self, indices: list[int], offered: list[int], step: Tensor, table: Tensor) -> list[list[int]]:
        """Return what each request's next causal pass is to commit after its last token.

        Args:
            indices: of the requests, in vLLM's tables.
            offered: how many drafts the step that has just run had room for, by request.
            step: int64 ``[requests, 3]`` on the device: tokens in the cache, the last token, tokens just decided.
            table: int32 ``[requests, pages]``, their pages.
        """
        blocks: dict[int, Block] = {}
        handed: dict[int, list[int]] = {}
        layer = next(iter(self._pass.layers.values()))
        page_size = page_layout(layer).page_size(layer)
        for row, (prefix, seed, decided) in enumerate(step.tolist()):
            request = self._requests[indices[row]]
            rest = request.after(decided - 1, offered[row])
            request.has_ended |= not rest and not request.stop_ids.isdisjoint([seed, *request.handed[-1:]])
            block = self._block(request, prefix, seed) if rest is None and not request.has_ended else None
            if block is None:
                handed[row] = rest or []
                continue
            block.pages = table[row, : -(-prefix // page_size)]
            blocks[row] = block
        self._pass.run(list(blocks.values()))
        for row, block in blocks.items():
            self.ledger.denoised(Tally(), block.passes)
            handed[row] = block.decided(self._mask)[1:]
        for row, tokens in handed.items():
            self._requests[indices[row]].handed = tokens
        return [handed[row] for row in range(len(indices))]

    def _block(self, request: Diffusing, prefix: int, seed: int) -> Block | None:
        """Return a request's next block, or None if there is nothing to decide."""
        decided, params = prefix + 1, request.params
        left = self._max_model_len if params.max_tokens is None else params.max_tokens - (decided - request.prompt)
        length = min(request.options.block_length or self._longest, left + 1, self._max_model_len - decided)
        if length < 2:
            return None
        tokens = [seed] + [self._mask] * (length - 1)
        return Block(prefix, tokens, CommitRule.for_diffusion(request.options), self._choice(request, prefix),
                     request.stop_ids)  # fmt: skip

    def _choice(self, request: Diffusing, prefix: int) -> TokenChoice | None:
        params, own = request.params, request.options.temperature
        temperature = params.temperature if own is None else own
        if temperature == 0:
            return None
        number = zlib.crc32(request.name.encode()) if params.seed is None else params.seed
        noise = Noise(number, self._sampler)
        return TokenChoice(self._vocab_size, noise, prefix, temperature, params.top_k, params.top_p)


def step_numbers(rows: Tensor, requests: Tensor, seq_lens: Tensor, num_rejected: Tensor, last_sampled: Tensor,
                 num_sampled: Tensor) -> Tensor:  # fmt: skip
    """Return what :meth:`Diffusion.propose` reads back, in one tensor: one wait for the device.

    Args:
        rows: int64, rows of the batch.
        requests: int64 ``[rows of the batch]``.
        seq_lens: int32, by row.
        num_rejected: int32, by row.
        last_sampled: int64 ``[requests, 1]``.
        num_sampled: int32, by row.
    """
    prefix = (seq_lens[rows] - num_rejected[rows]).long()
    return torch.stack((prefix, last_sampled[requests[rows], 0], num_sampled[rows].long()), 1)
