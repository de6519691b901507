"""The NLD network, made of vLLM's own layers, which bring quantization, tensor parallelism and torch.compile.

Only two things differ from vLLM's Mistral: the attention backend also runs draft passes (:mod:`vllm_nld.attention`),
and the mask token is never an answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP, LlamaModel
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from vllm_nld.attention.backend import block_attention_backend
from vllm_nld.checkpoints.draft_lora import DraftLoRA, adapter_of
from vllm_nld.config import NemotronLabsDiffusionConfig
from vllm_nld.model.adapter_shares import shares_of
from vllm_nld.model.draft_adapter import DraftAdapter, MaskRow, leave_adapter_out_of_graphs
from vllm_nld.names import MODEL_STATE
from vllm_nld.vllm_glue import cpu_repairs, layers, quantization


class NLDAttention(nn.Module):
    """Grouped-query attention with YaRN and the llama-4 query scale.

    Takes the arguments that ``vllm.model_executor.models.llama.LlamaDecoderLayer`` passes.
    """

    def __init__(
        self,
        config: NemotronLabsDiffusionConfig,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        max_position_embeddings: int,
        quant_config: QuantizationConfig | None = None,
        bias: bool = False,
        bias_o_proj: bool = False,
        cache_config: CacheConfig | None = None,
        prefix: str = "",
        **_: Any,
    ) -> None:
        super().__init__()
        self.scaling_config = config.llama_4_scaling
        shards = get_tensor_model_parallel_world_size()
        heads, kv_heads = num_heads // shards, max(1, num_kv_heads // shards)
        self.q_size, self.kv_size = heads * config.head_dim, kv_heads * config.head_dim
        self.qkv_proj = QKVParallelLinear(
            hidden_size, config.head_dim, num_heads, num_kv_heads, bias, quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )  # fmt: skip
        self.o_proj = RowParallelLinear(
            num_heads * config.head_dim, hidden_size, bias_o_proj, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        self.qkv_adapter: DraftAdapter | None = None
        self.o_adapter: DraftAdapter | None = None
        self.sums_itself = False
        self.rotary_emb = layers.unscaled_rope(config.head_dim, max_position_embeddings, config.rope_parameters)
        self.attn = Attention(
            heads,
            config.head_dim,
            config.head_dim**-0.5,
            num_kv_heads=kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
            attn_backend=block_attention_backend(config.head_dim, cache_config, quant_config),
        )

    def add_draft_adapter(self, lora: DraftLoRA, config: NemotronLabsDiffusionConfig) -> None:
        """Make room for an adapter's matrices."""
        self.qkv_adapter = draft_adapter(lora, config, "qkv_proj")
        self.o_adapter = draft_adapter(lora, config, "o_proj")
        self.sums_itself = takes_over_sum(self.o_proj, self.o_adapter)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Map ``positions`` int64 ``[tokens]`` and ``hidden_states`` ``[tokens, hidden]`` to ``[tokens, hidden]``."""
        qkv = project(self.qkv_proj, hidden_states, self.qkv_adapter)
        query, key, value = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)  # type: ignore[no-untyped-call]
        query, key = self.rotary_emb(positions, query, key)
        if self.scaling_config is not None:
            turns = torch.floor(positions / self.scaling_config["original_max_position_embeddings"])
            scale = 1 + self.scaling_config["beta"] * torch.log1p(turns)
            query = (query * scale.unsqueeze(-1)).to(query.dtype)
        projected = project(self.o_proj, self.attn(query, key, value), self.o_adapter)
        return tensor_model_parallel_all_reduce(projected) if self.sums_itself else projected


class AdaptedMLP(nn.Module):
    """vLLM's Llama feed-forward layer with a draft adapter; the linear layers keep their names.

    Args:
        mlp: vLLM's layer, whose parts are taken over.
        lora: on disk.
        config: of the model.
    """

    def __init__(self, mlp: LlamaMLP, lora: DraftLoRA, config: NemotronLabsDiffusionConfig) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = mlp.gate_up_proj, mlp.down_proj, mlp.act_fn
        self.gate_up_adapter = draft_adapter(lora, config, "gate_up_proj")
        self.down_adapter = draft_adapter(lora, config, "down_proj")
        self.sums_itself = takes_over_sum(self.down_proj, self.down_adapter)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[tokens, hidden]`` to ``[tokens, hidden]``."""
        # Not fused with a quantization of down_proj's input, as in vLLM's own layer: the adapter wants it whole.
        activated = self.act_fn(project(self.gate_up_proj, x, self.gate_up_adapter))
        projected = project(self.down_proj, activated, self.down_adapter)
        return tensor_model_parallel_all_reduce(projected) if self.sums_itself else projected


def project(linear: LinearBase, x: Tensor, adapter: DraftAdapter | None) -> Tensor:
    """Return a linear layer's output ``[tokens, outputs]``, in a draft with what the adapter adds."""
    output: Tensor = linear(x)[0]
    if adapter is not None:
        adapter(x, output)
    return output


def draft_adapter(lora: DraftLoRA, config: NemotronLabsDiffusionConfig, linear: str) -> DraftAdapter | None:
    """Return room for this rank's share of an adapter of a linear layer, or None if it changes nothing there."""
    rank, shards = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    shares = [share for share in shares_of(config, linear, rank, shards) if share.target in lora.targets]
    return DraftAdapter(lora.rank, shares) if shares else None


def takes_over_sum(linear: RowParallelLinear, adapter: DraftAdapter | None) -> bool:
    """Have a row-parallel layer leave its sum over the ranks to its caller, who adds the adapter's part first.

    Returns:
        Whether there is a sum to take.
    """
    if adapter is None or linear.tp_size == 1:
        return False
    linear.reduce_results = False
    return True


class NLDDecoderLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """vLLM's Llama layer around :class:`NLDAttention`."""

    def __init__(
        self, vllm_config: VllmConfig, prefix: str = "", config: NemotronLabsDiffusionConfig | None = None
    ) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, config=config, attn_layer_type=NLDAttention)

    def add_draft_adapter(self, lora: DraftLoRA, config: NemotronLabsDiffusionConfig) -> None:
        """Make room for an adapter's matrices."""
        self.self_attn.add_draft_adapter(lora, config)
        adapted = AdaptedMLP(self.mlp, lora, config)
        if adapted.gate_up_adapter is not None or adapted.down_adapter is not None:
            self.mlp: nn.Module = adapted


class NLDModel(LlamaModel):  # type: ignore[misc]
    """vLLM's Llama model, in which the mask token may have an input row for drafts only."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module]) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
        self.mask_row: MaskRow | None = None

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Map ids ``[tokens]`` to ``[tokens, hidden]``."""
        embedded: Tensor = super().embed_input_ids(input_ids)
        if self.mask_row is not None:
            self.mask_row(input_ids, embedded)
        return embedded


class NLDForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """NLD as vLLM's causal language model; the same object serves draft passes (:mod:`vllm_nld.draft_pass`).

    Attributes:
        draft_lora: the files of the adapter for drafts; the draft pass loads it.
    """

    hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={"encoder.": "model.", "diffusion_head.": "lm_head."})

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with quantization.named(vllm_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=NLDDecoderLayer)
        quantization.check_and_name(self, vllm_config)
        if vllm_config.device_config.device_type == "cpu":
            cpu_repairs.repair_seeded_prefills()
        self.never_emitted: tuple[int, ...] = vllm_config.model_config.hf_config.never_emitted
        self.draft_lora = adapter_of(vllm_config)
        if self.draft_lora is not None:
            self._add_draft_adapter(self.draft_lora, vllm_config.model_config.hf_config)
            leave_adapter_out_of_graphs(vllm_config.compilation_config)

    def _init_model(
        self, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] = NLDDecoderLayer
    ) -> NLDModel:
        return NLDModel(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)

    def _add_draft_adapter(self, lora: DraftLoRA, config: NemotronLabsDiffusionConfig) -> None:
        """Make room for an adapter in this pipeline stage's part of the model."""
        for layer in self.model.layers:
            if isinstance(layer, NLDDecoderLayer):
                layer.add_draft_adapter(lora, config)
        if lora.mask_row and get_pp_group().is_first_rank:
            self.model.mask_row = MaskRow(config.hidden_size, config.mask_token_id)

    @classmethod
    def get_model_state_cls(cls) -> type[Any]:
        """Return what vLLM's second runner keeps next to the model."""
        from vllm.utils.import_utils import resolve_obj_by_qualname

        state: type[Any] = resolve_obj_by_qualname(MODEL_STATE)
        return state

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return logits ``[tokens, vocab]`` with the mask token at minus infinity, or None off the gathering rank."""
        logits: Tensor | None = super().compute_logits(hidden_states)
        if logits is not None:
            for token in self.never_emitted:  # by index, with which nothing waits for the device
                logits[:, token] = -torch.inf
        return logits

    def shard_logits(self, hidden_states: Tensor) -> tuple[Tensor, int | None]:
        """Return this tensor-parallel rank's logits ``[tokens, columns]``, and the token id of their first column.

        The mask token is at minus infinity. Padding is cut off; a small vocabulary may fill only the first shard. If
        all ranks have all logits, the result is all of them, and None. See :mod:`vllm_nld.model.best_tokens`.
        """
        logits = layers.ungathered_logits(self, hidden_states) if self.lm_head.tp_size > 1 else None
        if logits is None:
            whole = self.compute_logits(hidden_states)
            assert whole is not None, "vLLM gathers logits on every rank"
            return whole, None
        shard = self.lm_head.shard_indices
        first, end = shard.org_vocab_start_index, shard.org_vocab_end_index
        logits = logits[:, : end - first]
        for token in self.never_emitted:
            if first <= token < end:
                logits[:, token - first] = -torch.inf
        return logits, first

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors by their released names; returns the names of the parameters that were filled."""
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
        return loaded
