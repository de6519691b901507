"""The draft adapter inside the model: two thin matrices a layer, and when they count.

On disk it is :mod:`vllm_nld.checkpoints.draft_lora`.

Whether a forward drafts is known from its metadata alone, as the attention mode is. The operator below is opaque to
torch.compile, so one compiled graph serves both, and in a causal pass it returns at once.
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

    Its matrices are buffers: vLLM's loader would miss parameters that are not among the checkpoint's tensors. With
    tensor parallelism A is cut along its input, as the weight of the row-parallel ``o_proj`` is; the layer sums over
    ranks behind both.

    Args:
        rank: of the adapter.
        inputs: heads times head size, of this tensor-parallel rank.
        outputs: the hidden size.
    """

    down: Tensor
    up: Tensor

    def __init__(self, rank: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("down", torch.zeros(inputs, rank), persistent=False)
        self.register_buffer("up", torch.zeros(rank, outputs), persistent=False)
        for matrix in (self.down, self.up):
            # vLLM's reload expects so many elements from the checkpoint, and calls it a failure when they do not come.
            matrix.weight_loader_numel = 0  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor, output: Tensor) -> None:
        """Add the adapter's part for ``hidden`` ``[tokens, inputs]`` to ``output`` ``[tokens, outputs]`` in a draft."""
        torch.ops.vllm_nld.add_draft_adapter(hidden, self.down, self.up, output)


def add_draft_adapter(hidden: Tensor, down: Tensor, up: Tensor, output: Tensor) -> None:
    """Add ``hidden @ down @ up`` to ``output``, at the tokens that the forward's metadata names, if it names any."""
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
# Not torch.library.custom_op: its wrapper takes longer than all else that a causal pass does here.


def is_being_captured(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured of what is done with a tensor."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def leave_adapter_out_of_graphs(compilation_config: Any) -> None:
    """Have vLLM cut the model's graph at the operator, so that no piecewise CUDA graph holds it; idempotent.

    Whether it does anything is decided whenever it runs; captured in a causal pass, it would never do anything again.
    vLLM fills ``splitting_ops`` after the config hook and reads it when it compiles, so this is called in between,
    when the model is made. Where it is empty, there are no piecewise graphs; a draft pass runs no graph at all.
    """
    operators = compilation_config.splitting_ops
    if operators and OPERATOR not in operators:
        operators.append(OPERATOR)


def load_adapter(adapter: DraftLoRA, model: nn.Module, shard: int, shards: int) -> None:
    """Fill a model's :class:`DraftAdapter` modules, the scale multiplied into B in float32.

    Args:
        adapter: on disk.
        model: whose adapter modules are named ``...layers.N....draft_adapter``.
        shard: this process's tensor-parallel rank.
        shards: how many there are.
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
