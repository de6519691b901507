"""The draft adapter inside the model: two thin matrices per layer, and when they apply.

:mod:`vllm_nld.checkpoints.draft_lora` handles its files.

Only a forward's metadata says whether it drafts, as for the attention mode. The operator below is opaque to
torch.compile, so one compiled graph serves both. In a causal pass the operator returns at once.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from vllm.forward_context import get_forward_context

from vllm_nld.attention.backend import DraftMetadata
from vllm_nld.checkpoints.draft_lora import WEIGHTS_FILE, DraftLoRA, tensor_names
from vllm_nld.errors import NLDError


class DraftAdapter(nn.Module):
    """One layer's share of the adapter.

    Its matrices are buffers, because vLLM's loader would report parameters that are not in the checkpoint as missing.
    With tensor parallelism A is split along its input, like the weight of the row-parallel ``o_proj``. The layer sums
    over ranks after both.

    Args:
        rank: rank of the adapter.
        inputs: heads times head size, of this tensor-parallel rank.
        outputs: hidden size.
    """

    down: Tensor
    up: Tensor

    def __init__(self, rank: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("down", torch.zeros(inputs, rank), persistent=False)
        self.register_buffer("up", torch.zeros(rank, outputs), persistent=False)
        for matrix in (self.down, self.up):
            # vLLM's reload expects this many elements from the checkpoint, and reports a failure if they are missing.
            matrix.weight_loader_numel = 0  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor, output: Tensor) -> None:
        """Add the adapter's part for ``hidden`` ``[tokens, inputs]`` to ``output`` ``[tokens, outputs]`` in a draft."""
        torch.ops.vllm_nld.add_draft_adapter(hidden, self.down, self.up, output)


def add_draft_adapter(hidden: Tensor, down: Tensor, up: Tensor, output: Tensor) -> None:
    """Add ``hidden @ down @ up`` to ``output``, at the tokens named by the forward's metadata, if any."""
    metadata = get_forward_context().attn_metadata
    if not isinstance(metadata, dict):
        return
    blocks = next(iter(metadata.values()), None)
    if not isinstance(blocks, DraftMetadata) or blocks.adapted is None:
        return
    if is_being_captured(output) and not blocks.in_graph:
        raise NLDError("a draft pass was about to be captured in a CUDA graph; its adapter would follow the capture")
    if isinstance(blocks.adapted, slice):
        output.addmm_(hidden @ down, up)
    elif blocks.adapted.is_floating_point():  # a CUDA graph has no room for a choice of tokens
        output.addmm_((hidden @ down).mul_(blocks.adapted), up)
    else:
        output.index_add_(0, blocks.adapted, hidden[blocks.adapted] @ down @ up)


OPERATOR = "vllm_nld::add_draft_adapter"

_library: Any = torch.library.Library("vllm_nld", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("add_draft_adapter(Tensor hidden, Tensor down, Tensor up, Tensor(a!) output) -> ()")
for _device in ("CPU", "CUDA"):
    _library.impl("add_draft_adapter", add_draft_adapter, dispatch_key=_device)
torch.library.register_fake("vllm_nld::add_draft_adapter", lambda hidden, down, up, output: None)
# Not torch.library.custom_op, whose wrapper takes longer than everything else that a causal pass does here.


def is_being_captured(tensor: Tensor) -> bool:
    """Whether operations on a tensor are being captured in a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def leave_adapter_out_of_graphs(compilation_config: Any) -> None:
    """Have vLLM split the model's graph at the operator, so that no piecewise CUDA graph contains it; idempotent.

    The operator decides in every run whether to do anything. If it were captured in a causal pass, it would never do
    anything again. vLLM fills ``splitting_ops`` after the config hook and reads it when it compiles, so this is called
    in between, when the model is made. If it is empty, there are no piecewise graphs; a draft pass runs no graph at
    all.
    """
    operators = compilation_config.splitting_ops
    if operators and OPERATOR not in operators:
        operators.append(OPERATOR)


def load_adapter(adapter: DraftLoRA, model: nn.Module, shard: int, shards: int) -> None:
    """Fill a model's :class:`DraftAdapter` modules. The scale is multiplied into B in float32.

    Args:
        adapter: the adapter's files.
        model: its adapter modules are named ``...layers.N....draft_adapter``.
        shard: this process's tensor-parallel rank.
        shards: number of tensor-parallel ranks.
    """
    from vllm.model_executor.models.utils import extract_layer_index

    modules = {name: module for name, module in model.named_modules() if isinstance(module, DraftAdapter)}
    with safe_open(adapter.folder / WEIGHTS_FILE, framework="pt") as handle, torch.no_grad():
        for name, module in modules.items():
            down, up = tensor_names(extract_layer_index(name))
            columns = module.down.shape[0]
            assert columns * shards == handle.get_slice(down).get_shape()[1], "heads divide among the ranks"
            own = handle.get_slice(down)[:, shard * columns : (shard + 1) * columns]
            module.down.copy_(own.t())
            module.up.copy_((handle.get_tensor(up).float() * adapter.scale).t())
