"""The platform's attention backend, taught to recognise a draft pass.

The mode switch is the forward context: a layer whose metadata is a :class:`DraftMetadata` attends bidirectionally
inside each block and over the request's cached prefix; any other metadata goes to the platform's own backend. The
draft's keys and values are never written, because the draft pass runs without slot mappings.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from vllm.config import CacheConfig
from vllm.v1.attention.selector import get_attn_backend

from vllm_nld.block_attention import block_attention
from vllm_nld.errors import NLDError
from vllm_nld.pages import PageLayout, find_layout


@dataclass(frozen=True)
class DraftMetadata:
    """Attention metadata of one draft pass, shared by all layers.

    Attributes:
        rows: requests that are drafted for.
        length: tokens per block, padding included.
        pages: int64 ``[rows, pages]``, the pages that hold each row's prefix (padding repeats any page).
        longest_prefix: tokens in the longest prefix.
        mask: bool ``[rows, 1, 1, longest_prefix + length]``, True where a key exists; None when all do.
        index: int64 ``[tokens]``, each token's place in the padded ``[rows * length]``; None when no row is padded.
    """

    rows: int
    length: int
    pages: Tensor
    longest_prefix: int
    mask: Tensor | None
    index: Tensor | None = None


class BlockTable:
    """The block table (request -> KV pages) of the step that vLLM is running, kept for the draft pass after it."""

    def __init__(self) -> None:
        self.pages: Tensor | None = None

    def rows(self, rows: list[int], tokens: int, page_size: int) -> Tensor:
        """Return the int64 page ids ``[len(rows), ceil(tokens / page_size)]`` of some batch rows.

        Raises:
            NLDError: no step has run yet, so there is no block table.
        """
        if self.pages is None:
            raise NLDError("a draft pass was asked for before the first model step")
        count = -(-tokens // page_size)
        index = torch.tensor(rows, device=self.pages.device)
        return self.pages[index, :count].long()


def block_attention_backend(head_dim: int, cache_config: CacheConfig | None) -> type[Any]:
    """Return the backend class for a layer: the platform's choice for this head size, plus draft passes."""
    cache_dtype = "auto" if cache_config is None else cache_config.cache_dtype
    chosen = get_attn_backend(head_dim, torch.get_default_dtype(), cache_dtype)
    if getattr(chosen, "forward_includes_kv_cache_update", False):
        raise NLDError(
            f"attention backend {chosen.get_name()} writes the KV cache inside its forward, so a draft pass cannot "
            "leave the cache alone; choose another with --attention-backend"
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
            if isinstance(attn_metadata, DraftMetadata):
                return draft_forward(layer, self.scale, query, key, value, attn_metadata, output)
            causal: Tensor = super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
            return causal

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
    """Return the layer's page layout, found out once."""
    if not hasattr(layer, "nld_page_layout"):
        layer.nld_page_layout = find_layout(layer)
    layout: PageLayout = layer.nld_page_layout
    return layout


def draft_forward(
    layer: Any, scale: float, query: Tensor, key: Tensor, value: Tensor, metadata: DraftMetadata, output: Tensor
) -> Tensor:
    """Write block-bidirectional attention into ``output`` ``[tokens, heads, head_dim]`` and return it."""
    head_dim = layer.head_size
    padded = metadata.rows * metadata.length
    used = padded if metadata.index is None else len(metadata.index)

    def blocks(x: Tensor) -> Tensor:
        x = x[:used].reshape(used, -1, head_dim)
        if metadata.index is not None:
            x = x.new_zeros(padded, *x.shape[1:]).index_copy_(0, metadata.index, x)
        return x.view(metadata.rows, metadata.length, -1, head_dim)

    prefix = page_layout(layer).gather(layer.kv_cache, head_dim, metadata.pages, metadata.longest_prefix)
    out = block_attention(blocks(query), blocks(key), blocks(value), prefix, metadata.mask, scale)
    if metadata.index is None:
        output[:used].view(out.shape).copy_(out)
    else:
        output[:used].view(used, -1, head_dim).copy_(out.reshape(padded, -1, head_dim)[metadata.index])
    return output
