"""Reading keys and values back from vLLM's paged KV cache.

vLLM's backends store pages differently (and change it between versions). Each known layout is one entry of
``LAYOUTS``; which one a layer uses is found by experiment, so that a changed layout stops with an error instead
of wrong drafts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_nld.errors import NLDError


@dataclass(frozen=True)
class PageLayout:
    """One way to lay out a layer's cache.

    Attributes:
        name: shown by errors and by the log.
        page_dim: which dimension of the cache counts pages.
        split: cache -> views (keys, values), each ``[pages, kv_heads, page_size, head_dim]``, any strides; or,
            in tiles, ``[pages, kv_heads, groups, tokens of a group, groups, dimensions of a group]``.
        accepts: whether a cache of this shape can have the layout, given the head size.
        tiled: whether ``split`` gives tiles. Not every implementation of the operators reads them.
    """

    name: str
    page_dim: int
    split: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    accepts: Callable[[torch.Size, int], bool]
    tiled: bool = False

    def page_size(self, layer: Any) -> int:
        """Tokens per page of an attention layer's cache."""
        return page_size(self.split(layer.kv_cache, layer.head_size)[0])

    def gather(self, cache: Tensor, head_dim: int, pages: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Return keys and values ``[rows, kv_heads, tokens, head_dim]`` of the first ``tokens`` positions.

        Args:
            cache: the layer's whole cache.
            head_dim: size of one head.
            pages: int64 ``[rows, pages]``, each row's first pages.
            tokens: positions to return; at most pages times the page size.
        """
        keys, values = self.split(cache, head_dim)
        return _rows(keys, pages, tokens), _rows(values, pages, tokens)


def page_size(pool: Tensor) -> int:
    """Tokens per page of a view that :attr:`PageLayout.split` gave."""
    return pool.shape[2] if pool.dim() == 4 else pool.shape[2] * pool.shape[3]


def refuse_tiles(pool: Tensor, reader: str) -> None:
    """Raise NLDError if a view has tiles, which ``reader`` cannot read."""
    if pool.dim() != 4:
        raise NLDError(f"{reader} attention reads no pages in tiles ({pool.dim()} dimensions); needed: 4 dimensions")


def whole_pages(pool: Tensor, pages: Tensor) -> Tensor:
    """Return a copy of some pages, in tiles or not: ``[*pages.shape, kv_heads, page_size, head_dim]``."""
    picked = pool[pages]
    return picked if pool.dim() == 4 else picked.flatten(-2).flatten(-3, -2)


def _rows(pool: Tensor, pages: Tensor, tokens: int) -> Tensor:
    return whole_pages(pool, pages).transpose(1, 2).flatten(2, 3)[:, :, :tokens]


def _fused_shape(shape: torch.Size, head_dim: int) -> bool:
    return len(shape) == 4 and shape[-1] == 2 * head_dim


def _split_column_pages(cache: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """vLLM's CPU cache on x86: per head, a key page ``[head_dim, page_size]``, then a value page, row-major."""
    pages, heads, size, _ = cache.shape
    halves = cache.view(pages, heads, 2, size * head_dim)
    keys = halves[:, :, 0].view(pages, heads, head_dim, size).transpose(2, 3)
    return keys, halves[:, :, 1].view(pages, heads, size, head_dim)


def _split_row_pages(cache: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    pages, heads, size, _ = cache.shape
    halves = cache.view(pages, heads, 2, size, head_dim)
    return halves[:, :, 0], halves[:, :, 1]


def _fits_tiles(shape: torch.Size, head_dim: int) -> bool:
    return _fused_shape(shape, head_dim) and shape[2] % 16 == 0 and head_dim % 16 == 0


def _split_tiles(cache: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """vLLM's CPU cache on CPUs with AMX: keys in tiles of 16 tokens by 2 dimensions, values of 2 by 16."""
    pages, heads, size, _ = cache.shape
    halves = cache.view(pages, heads, 2, size * head_dim)
    keys = halves[:, :, 0].view(pages, heads, size // 16, head_dim // 2, 16, 2)
    values = halves[:, :, 1].view(pages, heads, head_dim // 16, size // 2, 16, 2)
    return keys.permute(0, 1, 2, 4, 3, 5), values.permute(0, 1, 3, 5, 2, 4)


STRIDED = (
    PageLayout("column-major key pages (CPU)", 0, _split_column_pages, _fused_shape),
    PageLayout("row-major key pages (CPU)", 0, _split_row_pages, _fused_shape),
    PageLayout(
        "keys next to values, [pages, kv_heads, page_size, 2 * head_dim]",
        0,
        lambda cache, d: (cache[..., :d], cache[..., d:]),
        _fused_shape,
    ),
    PageLayout(
        "[2, pages, page_size, kv_heads, head_dim]",
        1,
        lambda cache, _: (cache[0].transpose(1, 2), cache[1].transpose(1, 2)),
        lambda shape, d: len(shape) == 5 and shape[0] == 2 and shape[-1] == d,
    ),
    PageLayout(
        "[pages, 2, page_size, kv_heads, head_dim]",
        0,
        lambda cache, _: (cache[:, 0].transpose(1, 2), cache[:, 1].transpose(1, 2)),
        lambda shape, d: len(shape) == 5 and shape[1] == 2 and shape[-1] == d,
    ),
    PageLayout(
        "[2, pages, kv_heads, page_size, head_dim]",
        1,
        lambda cache, _: (cache[0], cache[1]),
        lambda shape, d: len(shape) == 5 and shape[0] == 2 and shape[-1] == d,
    ),
)
"""Layouts that every implementation of the operators reads."""

TILED = PageLayout("tiles of 16 by 2 (CPU with AMX)", 0, _split_tiles, _fits_tiles, tiled=True)

LAYOUTS = (*STRIDED, TILED)
