"""The draft adapter inside the model: thin matrices for projections, the mask token's row, and when they apply.

:mod:`vllm_nld.checkpoints.draft_lora` handles its files.

Only a forward's metadata says whether it drafts, as for the attention mode (:func:`adapted_tokens`). The operators
below are opaque to torch.compile, so one compiled graph serves both. In a causal pass they return at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from vllm.forward_context import get_forward_context, is_forward_context_available

from vllm_nld.attention.backend import BranchedMetadata, DraftMetadata
from vllm_nld.checkpoints.draft_lora import MASK_ROW, WEIGHTS_FILE, DraftLoRA, tensor_names
from vllm_nld.errors import NLDError
from vllm_nld.model.adapter_shares import Share


class DraftAdapter(nn.Module):
    """What the adapter adds to one linear layer's output: one change per projection that the layer packs.

    Its matrices are buffers, because vLLM's loader would report parameters that are not in the checkpoint as missing.
    With tensor parallelism A is split along its input like the weight of a row-parallel layer, B along its output like
    that of a column-parallel layer. A row-parallel layer sums over ranks after both.

    Args:
        rank: rank of the adapter.
        shares: of the projections that it changes; all read the same input.
    """

    down: Tensor

    def __init__(self, rank: int, shares: Sequence[Share]) -> None:
        super().__init__()
        self.rank, self.shares = rank, tuple(shares)
        self.starts = [share.start for share in shares]
        _keep(self, "down", torch.zeros(len(shares[0].inputs), rank * len(shares)))
        self._up_names = [f"up_{share.target}" for share in shares]
        for name, share in zip(self._up_names, shares, strict=True):
            _keep(self, name, torch.zeros(rank, len(share.outputs)))

    @property
    def up(self) -> list[Tensor]:
        """The shares' B, transposed and scaled, ``[rank, outputs]``."""
        return [getattr(self, name) for name in self._up_names]

    def forward(self, hidden: Tensor, output: Tensor) -> None:
        """Add the adapter's part for ``hidden`` ``[tokens, inputs]`` to ``output`` ``[tokens, outputs]`` in a draft."""
        torch.ops.vllm_nld.add_draft_adapter(hidden, self.down, self.up, self.starts, output)

    def load(self, weights: Any, layer: int, scale: float) -> None:
        """Fill the matrices of a layer from an open file; the scale is multiplied into B in float32."""
        for index, share in enumerate(self.shares):
            a, b = map(weights.get_slice, tensor_names(layer, share.target))
            columns = slice(index * self.rank, (index + 1) * self.rank)
            self.down[:, columns].copy_(a[:, share.inputs.start : share.inputs.stop].t())
            self.up[index].copy_((b[share.outputs.start : share.outputs.stop].float() * scale).t())


class MaskRow(nn.Module):
    """The mask token's input row in draft passes.

    Args:
        hidden_size: of the model.
        mask_token_id: of the model.
    """

    row: Tensor

    def __init__(self, hidden_size: int, mask_token_id: int) -> None:
        super().__init__()
        self.mask_token_id = mask_token_id
        _keep(self, "row", torch.zeros(hidden_size))

    def forward(self, ids: Tensor, embedded: Tensor) -> None:
        """Put the row into ``embedded`` ``[tokens, hidden]`` where a draft's ``ids`` ``[tokens]`` are masks."""
        torch.ops.vllm_nld.set_mask_row(ids, self.row, self.mask_token_id, embedded)


def _keep(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Register a buffer that is not in the checkpoint."""
    module.register_buffer(name, tensor, persistent=False)
    # vLLM's reload expects this many elements from the checkpoint, and reports a failure if they are missing.
    tensor.weight_loader_numel = 0  # type: ignore[attr-defined]


def adapted_tokens(tensor: Tensor) -> Tensor | slice | None:
    """Return the tokens of the forward in progress that the adapter applies to; None if there are none.

    This is the only place where that is decided. They are all tokens, or int64 indices, or a factor of 0 or 1 per
    token, float ``[tokens, 1]``: a CUDA graph has no room for a choice of tokens.

    Args:
        tensor: what would be changed.

    Raises:
        NLDError: a CUDA graph is being captured of a forward that drafts, which is not meant for a graph.
    """
    if not is_forward_context_available():  # prompts are embedded before their forward
        return None
    metadata = get_forward_context().attn_metadata
    if not isinstance(metadata, dict):
        return None
    blocks = next(iter(metadata.values()), None)
    if not isinstance(blocks, DraftMetadata | BranchedMetadata) or blocks.adapted is None:
        return None
    if is_being_captured(tensor) and not blocks.in_graph:
        raise NLDError("a draft pass was about to be captured in a CUDA graph; its adapter would follow the capture")
    return blocks.adapted


def add_draft_adapter(hidden: Tensor, down: Tensor, up: list[Tensor], starts: list[int], output: Tensor) -> None:
    """Add ``hidden @ down @ up`` to the adapted tokens of ``output``; the i-th part begins at column ``starts[i]``."""
    adapted = adapted_tokens(output)
    if adapted is None:
        return
    chosen, factor = _chosen(adapted)
    low = hidden[chosen] @ down
    if factor is not None:
        low.mul_(factor)
    rank = up[0].shape[0]
    for index, (own, start) in enumerate(zip(up, starts, strict=True)):
        part = low[:, index * rank : (index + 1) * rank]
        columns = output[:, start : start + own.shape[1]]
        if isinstance(chosen, slice):
            columns.addmm_(part, own)
        else:
            columns.index_add_(0, chosen, part @ own)


def set_mask_row(ids: Tensor, row: Tensor, mask_token_id: int, embedded: Tensor) -> None:
    """Put ``row`` into ``embedded`` at the adapted tokens whose id is the mask token's."""
    adapted = adapted_tokens(embedded)
    if adapted is None:
        return
    chosen, factor = _chosen(adapted)
    masked = (ids[chosen] == mask_token_id).unsqueeze(1)  # as a condition: nothing waits for the device
    if factor is not None:
        masked = masked & (factor > 0)
    embedded[chosen] = torch.where(masked, row, embedded[chosen])


def _chosen(adapted: Tensor | slice) -> tuple[Tensor | slice, Tensor | None]:
    """Return the tokens to compute, and a factor for each of them, if they have one."""
    if isinstance(adapted, slice) or not adapted.is_floating_point():
        return adapted, None
    return slice(None), adapted


OPERATORS = {
    "vllm_nld::add_draft_adapter": (
        "(Tensor hidden, Tensor down, Tensor[] up, int[] starts, Tensor(a!) output) -> ()",
        add_draft_adapter,
    ),
    "vllm_nld::set_mask_row": (
        "(Tensor ids, Tensor row, int mask_token_id, Tensor(a!) embedded) -> ()",
        set_mask_row,
    ),
}

_library: Any = torch.library.Library("vllm_nld", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, (_schema, _function) in OPERATORS.items():
    _own_name = _name.removeprefix("vllm_nld::")
    _library.define(_own_name + _schema)
    for _device in ("CPU", "CUDA"):
        _library.impl(_own_name, _function, dispatch_key=_device)
    torch.library.register_fake(_name, lambda *_: None)
# Not torch.library.custom_op, whose wrapper takes longer than everything else that a causal pass does here.


def is_being_captured(tensor: Tensor) -> bool:
    """Whether operations on a tensor are being captured in a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def leave_adapter_out_of_graphs(compilation_config: Any) -> None:
    """Have vLLM split the model's graph at the operators, so that no piecewise CUDA graph contains them; idempotent.

    The operators decide in every run whether to do anything. If they were captured in a causal pass, they would never
    do anything again. vLLM fills ``splitting_ops`` after the config hook and reads it when it compiles, so this is
    called in between, when the model is made. If it is empty, there are no piecewise graphs; a draft pass runs no graph
    at all.
    """
    operators = compilation_config.splitting_ops
    if operators:
        operators.extend(name for name in OPERATORS if name not in operators)


def load_adapter(adapter: DraftLoRA, model: nn.Module) -> None:
    """Fill a model's :class:`DraftAdapter` modules, which are named ``...layers.N....``, and its :class:`MaskRow`."""
    from vllm.model_executor.models.utils import extract_layer_index

    with safe_open(adapter.folder / WEIGHTS_FILE, framework="pt") as weights, torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, DraftAdapter):
                module.load(weights, extract_layer_index(name), adapter.scale)
            elif isinstance(module, MaskRow):
                module.row.copy_(weights.get_tensor(MASK_ROW)[0])
