"""The platform's attention backend, extended with draft passes.

The mode switch is the forward context: a layer whose metadata is a :class:`DraftMetadata` attends bidirectionally
inside each block and over the request's cached prefix; any other metadata goes to the platform's own backend. The
draft's keys and values are never written, because the draft pass runs without slot mappings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from vllm.config import CacheConfig
from vllm.v1.attention.selector import get_attn_backend

from vllm_nld import ops
from vllm_nld.attention.layout import by_head, find_layout, head_scales, scales, typed_cache
from vllm_nld.errors import NLDError
from vllm_nld.ops.arguments import CAUSAL, BlockAttention
from vllm_nld.ops.pages import PageLayout


@dataclass(frozen=True)
class DraftMetadata:
    """Attention metadata of one draft pass, shared by all layers: the fields of :class:`BlockAttention` that do not
    depend on the layer.

    Attributes:
        block_table: int32 ``[rows, pages]``, the pages that hold each row's prefix (padding is never read).
        prefix_lens: int32 ``[rows]``, cached tokens.
        block_starts: int32 ``[rows + 1]``, where each row's tokens start.
        mask_kinds: int32 ``[rows]``, ``ops.BIDIRECTIONAL`` or ``ops.CAUSAL``.
        max_length: tokens of the longest block.
        max_prefix: tokens of the longest prefix.
        kind: what all mask kinds are, if the host knows that.
        adapted: the tokens that the draft adapter applies to: all, or int64 indices, or a factor of 0 or 1 per token
            ``[tokens, 1]`` of the model's dtype; None: none.
        tokens: of all rows; those after are padding. None: there is no padding.
        in_graph: whether it names buffers of fixed size, so that a CUDA graph of this draft pass may be captured.
    """

    block_table: Tensor
    prefix_lens: Tensor
    block_starts: Tensor
    mask_kinds: Tensor
    max_length: int
    max_prefix: int
    kind: int | None = None
    adapted: Tensor | slice | None = None
    tokens: int | None = None
    in_graph: bool = False


@dataclass(frozen=True)
class BranchedMetadata:
    """Attention metadata of a verify pass whose last rows are branches: blocks of a draft pass, in the same forward.

    Attributes:
        causal: the platform's own, of the first tokens.
        tokens: how many those are, padding included.
        branches: of the tokens after those.
        adapted: the tokens that the draft adapter applies to, as in :class:`DraftMetadata`.
    """

    causal: Any
    tokens: int
    branches: DraftMetadata
    adapted: Tensor | None

    @property
    def in_graph(self) -> bool:
        """As of :class:`DraftMetadata`."""
        return self.branches.in_graph


class BlockTable:
    """The block table (request -> KV pages) of the step that vLLM is running, kept for the draft pass after it."""

    def __init__(self) -> None:
        self.pages: Tensor | None = None

    def rows(self, rows: Sequence[int], tokens: int, page_size: int) -> Tensor:
        """Return the int32 page ids ``[len(rows), ceil(tokens / page_size)]`` of some batch rows.

        Raises:
            NLDError: no step has run yet, so there is no block table.
        """
        if self.pages is None:
            raise NLDError("a draft pass was requested before the first model step")
        count = -(-tokens // page_size)
        index = torch.tensor(list(rows), device=self.pages.device)
        return self.pages[index, :count].int()


def _parts(tokens: int, *tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the first ``tokens`` of every tensor, and the rest of every tensor."""
    return [x[:tokens] for x in tensors], [x[tokens:] for x in tensors]


def block_attention_backend(head_dim: int, cache_config: CacheConfig | None, quant_config: Any = None) -> type[Any]:
    """Return the backend class for a layer: the platform's choice for this head size and cache, plus draft passes.

    A checkpoint may ask for a float8 cache, and for a scale for each head; vLLM's layer applies that after this choice.
    """
    cache_dtype = "auto" if cache_config is None else cache_config.cache_dtype
    scheme = getattr(quant_config, "kv_cache_scheme", None) or {}
    if scheme and cache_dtype == "auto":
        cache_dtype = "fp8"
    by_head = {}
    if scheme.get("strategy") == "attn_head" and cache_dtype.startswith("fp8"):  # another dtype may overrule the scheme
        by_head = {"use_per_head_quant_scales": True}
    chosen = get_attn_backend(head_dim, torch.get_default_dtype(), cache_dtype, **by_head)
    if getattr(chosen, "forward_includes_kv_cache_update", False):
        raise NLDError(
            f"attention backend {chosen.get_name()} writes the KV cache inside its forward, so a draft pass cannot "
            "leave the cache unchanged; choose another with --attention-backend"
        )
    return _with_draft_passes(chosen)


@cache
def _with_draft_passes(base: type[Any]) -> type[Any]:
    """Subclass backend, implementation and metadata builder of ``base``; one subclass per backend."""
    base_impl, base_builder = base.get_impl_cls(), base.get_builder_cls()

    class Impl(base_impl):  # type: ignore[misc, valid-type]
        def forward(
            self,
            layer: Any,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            kv_cache: Tensor,
            attn_metadata: Any,
            output: Tensor,
            *args: Any,
            **kwargs: Any,
        ) -> Tensor:
            if isinstance(attn_metadata, BranchedMetadata):
                # The layer's keys and values of both parts' prefixes are in the cache: they were written before.
                first, rest = _parts(attn_metadata.tokens, query, key, value, output)
                query, key, value, own = first
                self.forward(layer, query, key, value, kv_cache, attn_metadata.causal, own, *args, **kwargs)
                query, key, value, own = rest
                block_forward(layer, self.scale, query, key, value, attn_metadata.branches, own)
                return output
            blocks = attn_metadata
            if not isinstance(blocks, DraftMetadata):
                blocks = verify_blocks(attn_metadata, query, layer)
            if blocks is not None:
                return block_forward(layer, self.scale, query, key, value, blocks, output)
            causal: Tensor = super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
            return causal

        # vLLM may fuse neighbors into the attention: a quantization of its output, or the rotation of queries and keys
        # into the write to the cache. A draft pass would then miss them: it has neither vLLM's kernel nor a write.
        def fused_output_quant_supported(self, *_: Any) -> bool:
            return False

        def fused_rope_kvcache_supported(self) -> bool:
            return False

        def fused_qk_norm_rope_kvcache_supported(self) -> bool:
            return False

        def fused_qk_norm_mrope_kvcache_supported(self) -> bool:
            return False

    class Builder(base_builder):  # type: ignore[misc, valid-type]
        """Sees every step's block table, also when a CUDA graph replays and no Python ``forward`` runs."""

        def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)
            self._table = block_table(vllm_config)

        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
            self._table.pages = common_attn_metadata.block_table_tensor
            return super().build(common_prefix_len, common_attn_metadata, fast_build)

    overrides = {
        "get_impl_cls": staticmethod(lambda: Impl),
        "get_builder_cls": staticmethod(lambda: Builder),
    }
    return type(f"NLD{base.__name__}", (base,), overrides)


def block_table(vllm_config: Any) -> BlockTable:
    """Return the engine's one block table; every attention layer of an NLD model shares its pages' numbering."""
    context = vllm_config.compilation_config.static_forward_context
    layers = [layer for layer in context.values() if hasattr(layer, "kv_cache")]
    if not hasattr(layers[0], "nld_block_table"):
        layers[0].nld_block_table = BlockTable()
    table: BlockTable = layers[0].nld_block_table
    return table


def page_layout(layer: Any) -> PageLayout:
    """Return the layer's page layout, found once."""
    if not hasattr(layer, "nld_page_layout"):
        layer.nld_page_layout = find_layout(layer)
    layout: PageLayout = layer.nld_page_layout
    return layout


def has_strided_pages(layer: Any) -> bool:
    """Whether the layer's pages can be read, and are not in tiles; found once."""
    if not hasattr(layer, "nld_has_strided_pages"):
        try:
            layer.nld_has_strided_pages = not page_layout(layer).tiled
        except NLDError:
            layer.nld_has_strided_pages = False
    strided: bool = layer.nld_has_strided_pages
    return strided


def verify_blocks(metadata: Any, query: Tensor, layer: Any) -> DraftMetadata | None:
    """Return a causal step as blocks with a causal mask, or None if the platform's own attention is better.

    In bfloat16 on a CPU with AVX-512 the operator is faster as soon as a row has several queries: verify passes,
    commits and prefills. Their keys and values were written to the cache before, but are also available here. Single
    tokens mostly read the cache, which the platform's kernel does as well. With a float8 cache AR
    attends to quantized fresh tokens, so verify passes must do so: the platform runs them. Tiled pages mean that the
    platform has AMX, which is faster than the operator. An unknown layout is no error here: AR does not need it.
    """
    if metadata is None or not fast_causal(query.device.type, query.dtype):
        return None
    if metadata.max_query_len <= 1 or metadata.causal is not True:
        return None
    if layer.kv_cache.element_size() == 1 or not has_strided_pages(layer):
        return None
    if not hasattr(metadata, "nld_blocks"):  # once a step, for all layers
        starts = metadata.query_start_loc.int()
        rows = len(starts) - 1
        metadata.nld_blocks = DraftMetadata(
            block_table=metadata.block_table[:rows].int(),
            prefix_lens=metadata.seq_lens[:rows].int() - starts.diff(),
            block_starts=starts,
            mask_kinds=torch.full((rows,), CAUSAL, dtype=torch.int32, device=starts.device),
            max_length=metadata.max_query_len,
            max_prefix=metadata.max_seq_len,
            kind=CAUSAL,
        )
    blocks: DraftMetadata = metadata.nld_blocks
    return blocks


@cache
def fast_causal(device_type: str, dtype: torch.dtype) -> bool:
    """Whether causal steps of several queries a row should use the operator, as its implementation states."""
    return ops.implementation("block_attention", device_type, dtype).fast_causal(dtype)


def block_forward(
    layer: Any, scale: float, query: Tensor, key: Tensor, value: Tensor, blocks: DraftMetadata, output: Tensor
) -> Tensor:
    """Write attention over cached prefixes and blocks into ``output`` ``[tokens, heads, head_dim]`` and return it."""
    head_dim = layer.head_size
    key_pages, value_pages = page_layout(layer).split(typed_cache(layer), head_dim)
    k_scale, v_scale = scales(layer)
    k_scales, v_scales = head_scales(layer)
    tokens = query.shape[0]  # padding included
    output = output.view(tokens, -1, head_dim)
    float8_query, q_scales, query = _with_own_scale(layer, query.view(tokens, -1, head_dim), output.dtype)
    padded = blocks.tokens is not None and blocks.tokens < tokens
    # By position, in the order of the fields: keywords take longer, and this runs once a layer.
    call = BlockAttention(
        query,
        key.view(tokens, -1, head_dim),
        value.view(tokens, -1, head_dim),
        key_pages,
        value_pages,
        blocks.block_table,
        blocks.prefix_lens,
        blocks.block_starts,
        blocks.mask_kinds,
        scale,
        k_scale,
        v_scale,
        blocks.max_length,
        blocks.max_prefix,
        output,
        blocks.kind,
        padded,
        k_scales,
        v_scales,
        float8_query,
        q_scales,
    )
    from_float8 = key_pages.element_size() == 1 and float8_query is None
    ops.function("block_attention", query.device.type, query.dtype, blocks.in_graph, from_float8)(call)
    if padded:
        output[blocks.tokens :] = 0  # a quantization with one scale for all tokens would include what was there before
    return output


def _with_own_scale(
    layer: Any, query: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, Tensor]:
    """Return what vLLM has rounded a query to and its scales ``[Hkv]``, if it has, and the query in ``dtype``.

    vLLM rounds queries before it calls a backend that multiplies float8 by float8: FlashAttention on Hopper and
    Blackwell. A scale is of all heads, or of the query heads that share a KV head. AR and verify passes see rounded
    queries, so the draft does as well.
    """
    if query.element_size() > 1:
        return None, None, query
    q_scales = by_head(layer._q_scale, layer)
    grouped = query.view(query.shape[0], layer.num_kv_heads, -1, query.shape[2]).to(dtype)
    return query, q_scales, (grouped * q_scales[:, None, None]).to(dtype).flatten(1, 2)
