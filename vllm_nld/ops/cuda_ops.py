"""The operators of ``docs/operators.md`` by the CUDA kernels of ``csrc/cuda``, through ctypes.

The library is ``libnld_cuda.so``, built by ``scripts/build_cuda.sh`` or CMake: the file that the environment variable
``VLLM_NLD_CUDA_LIBRARY`` names, or the one in the package's folder ``native``. The tests load an emulation of it, which
takes tensors on the CPU.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import AbstractContextManager, nullcontext
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vllm_nld
from vllm_nld.errors import NLDError
from vllm_nld.ops import check_logits, fake_best_tokens
from vllm_nld.ops.pages import refuse_tiles

LIBRARY = "VLLM_NLD_CUDA_LIBRARY"
_TYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 4,
}


class _BlockAttention(Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("query", "key", "value", "output")],
        *[(f"{name}_strides", c_int64 * 2) for name in ("query", "key", "value", "output")],
        *[(name, c_void_p) for name in ("key_pages", "value_pages")],
        *[(f"{name}_strides", c_int64 * 4) for name in ("key_page", "value_page")],
        ("block_table", c_void_p),
        ("block_table_stride", c_int64),
        *[(name, c_void_p) for name in ("prefix_lens", "block_starts", "mask_kinds", "mask_words")],
        ("mask_words_stride", c_int64),
        *[(name, c_int32) for name in ("mask_width", "rows", "heads", "kv_heads", "head_size", "page_size")],
        *[(name, c_int32) for name in ("max_length", "max_prefix", "type", "cache_type")],
        *[(name, c_float) for name in ("scale", "k_scale", "v_scale")],
        ("split_limit", c_int32),
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
    ]


class _AcceptPrefix(Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("drafts", "targets", "starts", "accepted", "tokens", "token_starts", "seeds")],
        *[(name, c_int32) for name in ("rows", "drafts_total")],
    ]


class _Cache(Structure):
    _fields_ = [("pages", c_void_p), ("strides", c_int64 * 4)]


class _MoveKv(Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("caches", "sources", "targets")],
        *[(name, c_int32) for name in ("cache_count", "moves", "kv_heads", "page_size", "head_size")],
        *[(name, c_int32) for name in ("element_bytes", "vector_bytes")],
    ]


class _BestTokens(Structure):
    _fields_ = [
        ("logits", c_void_p),
        ("row_stride", c_int64),
        *[(name, c_void_p) for name in ("tokens", "largest", "normalisers")],
        *[(name, c_int32) for name in ("rows", "vocab", "type")],
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
    ]


_ARGUMENTS: dict[str, list[Any]] = {
    "nld_block_attention_workspace": [POINTER(_BlockAttention), POINTER(c_size_t)],
    "nld_block_attention": [POINTER(_BlockAttention), c_void_p],
    "nld_accept_prefix": [POINTER(_AcceptPrefix), c_void_p],
    "nld_move_kv_vector_bytes": [POINTER(_Cache), c_int, c_int, c_int],
    "nld_move_kv": [POINTER(_MoveKv), c_void_p],
    "nld_best_tokens_workspace": [POINTER(_BestTokens), POINTER(c_size_t)],
    "nld_best_tokens": [POINTER(_BestTokens), c_void_p],
    "nld_cuda_message": [c_int],
    "nld_cuda_emulated": [],
}


def library_path() -> Path:
    """Return where the library is looked for."""
    if os.environ.get(LIBRARY):
        return Path(os.environ[LIBRARY])
    places = [Path(folder, "native", "libnld_cuda.so") for folder in vllm_nld.__path__]
    return next((place for place in places if place.exists()), places[0])


@cache
def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, arguments in _ARGUMENTS.items():
        getattr(library, name).argtypes = arguments
    library.nld_cuda_message.restype = c_char_p
    return library


def _library() -> ctypes.CDLL:
    try:
        return _load(library_path())
    except OSError as error:
        raise NLDError(f"cannot load the CUDA operators: {error}; build them, or set {LIBRARY}") from error


def unavailable(device: torch.device) -> str | None:
    """Return why the operators cannot be used on ``device``; None if they can."""
    if not library_path().exists():
        return f"{library_path()} is not built ({LIBRARY})"
    try:
        emulated = bool(_library().nld_cuda_emulated())
    except NLDError as error:
        return str(error)
    if emulated != (device.type == "cpu"):
        return "the library is the emulation, for a CPU" if emulated else f"needs a CUDA device, not {device}"
    return None


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    prefix_lens: Tensor,
    block_starts: Tensor,
    mask_kinds: Tensor,
    mask_words: Tensor | None,
    scale: float,
    k_scale: float,
    v_scale: float,
    max_length: int,
    max_prefix: int,
    output: Tensor,
    *,
    split_limit: int = 0,
) -> None:
    """Write attention of every fresh token over its row's cached prefix and its own block.

    Everything but ``split_limit`` is as in ``docs/operators.md``.

    Args:
        query: ``[T, H, D]``.
        key: ``[T, Hkv, D]``.
        value: ``[T, Hkv, D]``.
        key_pages: ``[P, Hkv, S, D]``.
        value_pages: ``[P, Hkv, S, D]``.
        block_table: int32 ``[R, M]``.
        prefix_lens: int32 ``[R]``.
        block_starts: int32 ``[R + 1]``.
        mask_kinds: int32 ``[R]``.
        mask_words: int32 ``[T, W]`` or None.
        scale: of the scores.
        k_scale: of float8 keys.
        v_scale: of float8 values.
        max_length: longest block.
        max_prefix: longest prefix.
        output: ``[T, H, D]``.
        split_limit: most pieces that a prefix is split into; 0: the operator chooses, 1: no splitting.
    """
    _check_attention(query, key, value, key_pages, value_pages, output)
    for name, x in {"block_table": block_table, "mask_words": mask_words}.items():
        if x is not None and (x.dtype != torch.int32 or (x.shape[1] > 1 and x.stride(1) != 1)):
            raise NLDError(f"{name} must be int32 with contiguous rows")
    _check_lists(torch.int32, prefix_lens=prefix_lens, block_starts=block_starts, mask_kinds=mask_kinds)
    call = _BlockAttention(
        block_table=block_table.data_ptr(),
        block_table_stride=block_table.stride(0),
        prefix_lens=prefix_lens.data_ptr(),
        block_starts=block_starts.data_ptr(),
        mask_kinds=mask_kinds.data_ptr(),
        mask_words=mask_words.data_ptr() if mask_words is not None else None,
        mask_words_stride=mask_words.stride(0) if mask_words is not None else 0,
        mask_width=mask_words.shape[1] if mask_words is not None else 0,
        rows=prefix_lens.shape[0],
        heads=query.shape[1],
        kv_heads=key.shape[1],
        head_size=query.shape[2],
        page_size=key_pages.shape[2],
        max_length=max_length,
        max_prefix=max_prefix,
        type=_TYPES[query.dtype],
        cache_type=_TYPES[key_pages.dtype],
        scale=scale,
        k_scale=k_scale,
        v_scale=v_scale,
        split_limit=split_limit,
    )
    for name, x in {"query": query, "key": key, "value": value, "output": output}.items():
        setattr(call, name, x.data_ptr())
        setattr(call, f"{name}_strides", (c_int64 * 2)(*x.stride()[:2]))
    for name, x in {"key_page": key_pages, "value_page": value_pages}.items():
        setattr(call, f"{name}s", x.data_ptr())
        setattr(call, f"{name}_strides", (c_int64 * 4)(*x.stride()))
    if query.shape[0] == 0:
        return
    library, size = _library(), c_size_t()
    with _on(query.device):
        _check(library, library.nld_block_attention_workspace(byref(call), byref(size)))
        workspace = torch.empty(size.value, dtype=torch.uint8, device=query.device)
        call.workspace, call.workspace_bytes = workspace.data_ptr(), size.value
        _check(library, library.nld_block_attention(byref(call), _stream(query.device)))


def accept_prefix(drafts: Tensor, targets: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return accepted lengths, packed tokens, their starts and seeds, as ``docs/operators.md`` describes them.

    Args:
        drafts: int64 ``[N]``.
        targets: int64 ``[N + R]``.
        starts: int32 ``[R + 1]``.
    """
    _check_lists(torch.int64, drafts=drafts, targets=targets)
    _check_lists(torch.int32, starts=starts)
    rows = starts.shape[0] - 1
    accepted, token_starts = starts.new_empty(rows), starts.new_empty(rows + 1)
    tokens, seeds = torch.empty_like(targets), targets.new_empty(rows)
    call = _AcceptPrefix(
        drafts=drafts.data_ptr(),
        targets=targets.data_ptr(),
        starts=starts.data_ptr(),
        accepted=accepted.data_ptr(),
        tokens=tokens.data_ptr(),
        token_starts=token_starts.data_ptr(),
        seeds=seeds.data_ptr(),
        rows=rows,
        drafts_total=drafts.shape[0],
    )
    library = _library()
    with _on(drafts.device):
        _check(library, library.nld_accept_prefix(byref(call), _stream(drafts.device)))
    return accepted, tokens, token_starts, seeds


def move_kv(caches: list[Tensor], sources: Tensor, targets: Tensor) -> None:
    """Copy keys and values of every source slot to its target slot, in all layers.

    The first call with a set of caches copies their addresses to the device; later ones only launch.

    Args:
        caches: per layer, key pages and value pages alternating, each ``[P, Hkv, S, D]``.
        sources: int64 ``[N]``.
        targets: int64 ``[N]``.
    """
    _check_lists(torch.int64, sources=sources, targets=targets)
    if not caches or sources.shape[0] == 0:
        return
    first = caches[0]
    if any(pool.shape != first.shape or pool.dtype != first.dtype for pool in caches):
        raise NLDError("all caches must have the same shape and dtype")
    _, kv_heads, page_size, head_size = first.shape
    table, vector_bytes = _cache_table(
        tuple((pool.data_ptr(), pool.stride()) for pool in caches), head_size, first.element_size(), first.device
    )
    call = _MoveKv(
        caches=table.data_ptr(),
        sources=sources.data_ptr(),
        targets=targets.data_ptr(),
        cache_count=len(caches),
        moves=sources.shape[0],
        kv_heads=kv_heads,
        page_size=page_size,
        head_size=head_size,
        element_bytes=first.element_size(),
        vector_bytes=vector_bytes,
    )
    library = _library()
    with _on(first.device):
        _check(library, library.nld_move_kv(byref(call), _stream(first.device)))


@cache
def _cache_table(
    caches: tuple[tuple[int, tuple[int, ...]], ...], head_size: int, element_bytes: int, device: torch.device
) -> tuple[Tensor, int]:
    """Return the NldCache array on the device, and the widest access that suits all caches."""
    array = (_Cache * len(caches))(*(_Cache(pointer, (c_int64 * 4)(*strides)) for pointer, strides in caches))
    vector_bytes = _library().nld_move_kv_vector_bytes(array, len(caches), head_size, element_bytes)
    words = torch.frombuffer(bytearray(array), dtype=torch.int64)
    return words.to(device), int(vector_bytes)


def best_tokens(logits: Tensor, with_normaliser: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's most probable token, its logit and the row's normaliser, as ``docs/operators.md`` says.

    Args:
        logits: float32, bfloat16 or float16 ``[rows, vocab]``, inner stride 1.
        with_normaliser: whether the normaliser is wanted; without, the third result is ``[0]``.
    """
    check_logits(logits)
    tokens, largest, normalisers = fake_best_tokens(logits, with_normaliser)
    call = _BestTokens(
        logits=logits.data_ptr(),
        row_stride=logits.stride(0),
        tokens=tokens.data_ptr(),
        largest=largest.data_ptr(),
        normalisers=normalisers.data_ptr() if with_normaliser else None,
        rows=logits.shape[0],
        vocab=logits.shape[1],
        type=_TYPES[logits.dtype],
    )
    if logits.shape[0] == 0:
        return tokens, largest, normalisers
    library, size = _library(), c_size_t()
    with _on(logits.device):
        _check(library, library.nld_best_tokens_workspace(byref(call), byref(size)))
        workspace = torch.empty(size.value, dtype=torch.uint8, device=logits.device)
        call.workspace, call.workspace_bytes = workspace.data_ptr(), size.value
        _check(library, library.nld_best_tokens(byref(call), _stream(logits.device)))
    return tokens, largest, normalisers


def _check_attention(
    query: Tensor, key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, output: Tensor
) -> None:
    for name, x in {"query": query, "key": key, "value": value, "output": output}.items():
        if x.dtype not in _TYPES or x.dtype != query.dtype:
            raise NLDError(f"{name} is {x.dtype}; all four must be the same of float32, bfloat16, float16")
        if x.stride(2) != 1:
            raise NLDError(f"the inner dimension of {name} must be contiguous")
    refuse_tiles(key_pages, "CUDA")
    if key_pages.dtype not in _TYPES or value_pages.dtype != key_pages.dtype:
        raise NLDError(f"the cache is {key_pages.dtype} and {value_pages.dtype}; both must be the same known dtype")


def _check_lists(dtype: torch.dtype, **lists: Tensor) -> None:
    for name, x in lists.items():
        if x.dtype != dtype or not x.is_contiguous():
            raise NLDError(f"{name} must be contiguous and {dtype}, not {x.dtype}")


def _check(library: ctypes.CDLL, status: int) -> None:
    if status != 0:
        raise NLDError(f"CUDA operator: {library.nld_cuda_message(status).decode()} (status {status})")


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _stream(device: torch.device) -> int | None:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
