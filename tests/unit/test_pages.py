"""Every page layout, filled element by element from its description, and the search for a layer's layout."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.support.cpus import vllm_writes_tiles, write_tiles
from vllm_nld.attention.layout import find_layout
from vllm_nld.errors import NLDError
from vllm_nld.ops.pages import LAYOUTS, STRIDED, TILED, PageLayout

PAGES, SIZE, HEADS, DIM = 6, 4, 3, 8

Put = Callable[[Tensor, int, int, int, Tensor, Tensor], None]
Write = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def put_columns(cache: Tensor, page: int, offset: int, head: int, key: Tensor, value: Tensor) -> None:
    flat = cache[page, head].view(-1)
    size = cache.shape[2]
    for i in range(DIM):
        flat[i * size + offset] = key[i]
        flat[size * DIM + offset * DIM + i] = value[i]


def put_rows(cache: Tensor, page: int, offset: int, head: int, key: Tensor, value: Tensor) -> None:
    flat = cache[page, head].view(-1)
    start = cache.shape[2] * DIM
    flat[offset * DIM : (offset + 1) * DIM] = key
    flat[start + offset * DIM : start + (offset + 1) * DIM] = value


def put_beside(cache: Tensor, page: int, offset: int, head: int, key: Tensor, value: Tensor) -> None:
    cache[page, head, offset, :DIM] = key
    cache[page, head, offset, DIM:] = value


def put_split_first(cache: Tensor, page: int, offset: int, head: int, key: Tensor, value: Tensor) -> None:
    cache[0, page, offset, head] = key
    cache[1, page, offset, head] = value


def put_split_second(cache: Tensor, page: int, offset: int, head: int, key: Tensor, value: Tensor) -> None:
    cache[page, 0, offset, head] = key
    cache[page, 1, offset, head] = value


def put_split_first_by_head(cache: Tensor, page: int, offset: int, head: int, key: Tensor, value: Tensor) -> None:
    cache[0, page, head, offset] = key
    cache[1, page, head, offset] = value


FUSED = (PAGES, HEADS, SIZE, 2 * DIM)
BY_HAND: list[tuple[tuple[int, ...], int, Put]] = [
    (FUSED, 2, put_columns),
    (FUSED, 2, put_rows),
    (FUSED, 2, put_beside),
    ((2, PAGES, SIZE, HEADS, DIM), 2, put_split_first),
    ((PAGES, 2, SIZE, HEADS, DIM), 2, put_split_second),
    ((2, PAGES, HEADS, SIZE, DIM), 3, put_split_first_by_head),
]
CASES = [pytest.param(layout, *case, id=layout.name) for layout, case in zip(STRIDED, BY_HAND, strict=True)]


@pytest.mark.parametrize(("layout", "shape", "size_dim", "put"), CASES)
def test_gather(layout: PageLayout, shape: tuple[int, ...], size_dim: int, put: Put) -> None:
    cache = torch.full(shape, -1.0)
    pages = torch.tensor([[4, 0], [2, 5]])
    tokens = SIZE + 3
    generator = torch.Generator().manual_seed(0)
    written = torch.randn(2, 2, tokens, HEADS, DIM, generator=generator)  # [row, key or value, token, head, component]
    for row in range(2):
        for token in range(tokens):
            for head in range(HEADS):
                page = int(pages[row, token // SIZE])
                put(cache, page, token % SIZE, head, written[row, 0, token, head], written[row, 1, token, head])
    before = cache.clone()
    keys, values = layout.gather(cache, DIM, pages, tokens)
    assert keys.shape == values.shape == (2, HEADS, tokens, DIM)
    assert torch.equal(keys, written[:, 0].transpose(1, 2))
    assert torch.equal(values, written[:, 1].transpose(1, 2))
    assert torch.equal(cache, before)
    assert layout.accepts(cache.shape, DIM)
    assert layout.page_size(SimpleNamespace(kv_cache=cache, head_size=DIM)) == SIZE


class FakeLayer:
    """An attention layer whose backend writes its cache with ``put``."""

    def __init__(self, shape: tuple[int, ...], size_dim: int, put: Put) -> None:
        self.kv_cache = torch.full(shape, 7.0)
        self.num_kv_heads, self.head_size = HEADS, DIM
        self.impl = self
        self.attn_backend = SimpleNamespace(get_name=lambda: "FAKE_ATTN")
        self._size, self._put = shape[size_dim], put

    def do_kv_cache_update(self, layer: object, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        for token, slot in enumerate(slots.tolist()):
            for head in range(HEADS):
                self._put(cache, slot // self._size, slot % self._size, head, key[token, head], value[token, head])


@pytest.mark.parametrize(("layout", "shape", "size_dim", "put"), CASES)
def test_find_layout(layout: PageLayout, shape: tuple[int, ...], size_dim: int, put: Put) -> None:
    layer = FakeLayer(shape, size_dim, put)
    assert find_layout(layer) is layout
    assert (layer.kv_cache == 7.0).all(), "the layer's own cache must not be written"


def put_nothing(cache: Tensor, page: int, offset: int, head: int, key: Tensor, value: Tensor) -> None:
    pass


def put_swapped(cache: Tensor, page: int, offset: int, head: int, key: Tensor, value: Tensor) -> None:
    put_beside(cache, page, offset, head, value, key)


@pytest.mark.parametrize(
    ("shape", "put"), [(FUSED, put_nothing), (FUSED, put_swapped), ((PAGES, SIZE, HEADS * DIM), put_nothing)]
)
def test_unknown_layout_is_refused(shape: tuple[int, ...], put: Put) -> None:
    with pytest.raises(NLDError) as caught:
        find_layout(FakeLayer(shape, 2, put))
    assert "FAKE_ATTN" in str(caught.value)
    assert str(list(shape)) in str(caught.value)
    assert LAYOUTS[0].name in str(caught.value)


class TiledLayer:
    """An attention layer of a CPU with AMX. Writing its cache needs no AMX: ``write`` is vLLM's operator, or ours."""

    def __init__(self, page_size: int, head_dim: int, write: Write) -> None:
        self.kv_cache = torch.zeros(5, HEADS, page_size, 2 * head_dim, dtype=torch.bfloat16)
        self.dtype, self.num_kv_heads, self.head_size = torch.bfloat16, HEADS, head_dim
        self.impl = self
        self.attn_backend = SimpleNamespace(get_name=lambda: "CPU_ATTN")
        self._write = write

    def do_kv_cache_update(self, layer: object, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        self._write(key, value, cache, slots)


def write_with_vllm(key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
    from vllm import _custom_ops as vllm_ops

    pages, heads, size, width = cache.shape
    keys, values = cache.view(pages, heads, 2 * size, width // 2).chunk(2, dim=2)
    vllm_ops.cpu_attn_reshape_and_cache(key, value, keys, values, slots, "amx")


@pytest.mark.parametrize("write", [write_tiles, write_with_vllm])
@pytest.mark.parametrize(("page_size", "head_dim"), [(32, 32), (128, 128), (96, 64)])
def test_tiles_equal_the_pages_of_vllm_on_amx(page_size: int, head_dim: int, write: Write) -> None:
    if write is write_with_vllm and not vllm_writes_tiles():
        pytest.skip("the build of vLLM for this CPU writes no tiles")
    layer = TiledLayer(page_size, head_dim, write)
    assert find_layout(layer) is TILED
    assert TILED.page_size(layer) == page_size
    tokens = page_size + 7
    written = torch.randn(2, tokens, HEADS, head_dim, dtype=torch.bfloat16)
    pages = torch.tensor([[3, 1]])
    slots = (pages[0, :, None] * page_size + torch.arange(page_size)).flatten()[:tokens]
    layer.do_kv_cache_update(layer, written[0], written[1], layer.kv_cache, slots)
    read = TILED.gather(layer.kv_cache, head_dim, pages, tokens)
    assert torch.equal(torch.stack(read)[:, 0], written.transpose(1, 2))
