"""The description of one implementation of the operators: everything that other modules need to know about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_nld.ops.arguments import BlockAttention

OPERATORS = ("block_attention", "accept_prefix", "best_tokens")

FLOAT32, HALF = (torch.float32,), (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Implementation:
    """A way to compute the operators (docs/developer/operators.md). Each ``ops/*_ops.py`` has one, ``IMPLEMENTATION``.

    Attributes:
        name: as ``VLLM_NLD_OPS``, ``vllm-nld doctor`` and the documentation call it.
        devices: device types it serves.
        block_attention: writes its argument's ``output``. Called by every layer in a draft pass.
        accept_prefix: called once a step, when drafts are verified greedily; None: another implementation does it.
        best_tokens: called for the logits of each draft pass and of greedy verification; None: another does it.
        needs: what makes it available, in a few words, for the documentation.
        package: the distribution whose version ``doctor`` shows, if it needs one.
        obstacle: returns why it cannot serve one of ``devices``, or None. Called once, when implementations are chosen;
            must not raise if its package is missing.
        dtypes: of the query.
        reads_head_scales: takes a float8 scale for each KV head. If not, it must refuse these with NLDError.
        copies_float8: dequantizes all float8 pages in use into memory of its own, unless FlashAttention multiplies
            float8 queries by them. The others, which dequantize in registers, are preferred to it.
        reads_tiles: reads KV pages in tiles (``ops.pages.TILED``). If not, it must refuse such pages with NLDError.
        graph_safe: its calls never wait for the device, so a CUDA graph may capture them.
        first_in_graphs: preferred to all others where a CUDA graph holds the call: its kernels are the fastest, but
            take the host long to launch one by one.
        fast_causal: called once per dtype; returns whether causal steps with several tokens of a request (verify,
            commit, prefill) should use its ``block_attention`` instead of vLLM's attention.
        details: returns what ``doctor`` prints in brackets after the name.
    """

    name: str
    devices: tuple[str, ...]
    block_attention: Callable[[BlockAttention], None]
    accept_prefix: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]] | None = None
    best_tokens: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None
    needs: str = "nothing"
    package: str | None = None
    obstacle: Callable[[torch.device], str | None] = lambda _: None
    dtypes: tuple[torch.dtype, ...] = FLOAT32 + HALF
    reads_head_scales: bool = True
    copies_float8: bool = False
    reads_tiles: bool = False
    graph_safe: bool = False
    first_in_graphs: bool = False
    fast_causal: Callable[[torch.dtype], bool] = lambda _: False
    details: Callable[[], str] = lambda: ""

    @property
    def operators(self) -> tuple[str, ...]:
        """Names of the operators it has."""
        return tuple(name for name in OPERATORS if getattr(self, name) is not None)

    def unavailable(self, device: torch.device) -> str | None:
        """Return why it cannot serve a device, or None if it can."""
        if device.type not in self.devices:
            return f"it serves {' and '.join(self.devices)}, not {device.type}"
        return self.obstacle(device)
