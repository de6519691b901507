"""The operators of ``docs/developer/operators.md`` by the CUDA kernels of ``csrc/cuda``, through ctypes.

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
from vllm_nld.ops.arguments import BlockAttention, check_logits, empty_best
from vllm_nld.ops.implementation import Implementation
from vllm_nld.ops.pages import refuse_tiles

LIBRARY = "VLLM_NLD_CUDA_LIBRARY"
ABI_VERSION = 3
"""Of the interface; ``csrc/cuda/small_operators.cu`` has the same number."""
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
        *[(name, c_void_p) for name in ("prefix_lens", "block_starts", "mask_kinds")],
        *[(name, c_int32) for name in ("rows", "heads", "kv_heads", "head_size", "page_size")],
        *[(name, c_int32) for name in ("max_length", "max_prefix", "type", "cache_type")],
        *[(name, c_float) for name in ("scale", "k_scale", "v_scale")],
        *[(name, c_void_p) for name in ("k_scales", "v_scales")],
        *[(name, c_int64) for name in ("k_scales_stride", "v_scales_stride")],
        ("split_limit", c_int32),
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
    ]


class _AcceptPrefix(Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("drafts", "targets", "starts", "accepted", "tokens", "token_starts", "seeds")],
        *[(name, c_int32) for name in ("rows", "drafts_total")],
    ]


class _BestTokens(Structure):
    _fields_ = [
        ("logits", c_void_p),
        ("row_stride", c_int64),
        *[(name, c_void_p) for name in ("tokens", "largest", "normalizers")],
        *[(name, c_int32) for name in ("rows", "vocab", "type")],
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
    ]


_ARGUMENTS: dict[str, list[Any]] = {
    "nld_block_attention_workspace": [POINTER(_BlockAttention), POINTER(c_size_t)],
    "nld_block_attention": [POINTER(_BlockAttention), c_void_p],
    "nld_accept_prefix": [POINTER(_AcceptPrefix), c_void_p],
    "nld_best_tokens_workspace": [POINTER(_BestTokens), POINTER(c_size_t)],
    "nld_best_tokens": [POINTER(_BestTokens), c_void_p],
    "nld_cuda_message": [c_int],
    "nld_cuda_abi_version": [],
    "nld_cuda_emulated": [],
}


def library_path() -> Path:
    """Return the path at which the library is expected."""
    if os.environ.get(LIBRARY):
        return Path(os.environ[LIBRARY])
    places = [Path(folder, "native", "libnld_cuda.so") for folder in vllm_nld.__path__]
    return next((place for place in places if place.exists()), places[0])


@cache
def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    version = library.nld_cuda_abi_version() if hasattr(library, "nld_cuda_abi_version") else 1
    if version != ABI_VERSION:
        found = f"its operators have version {version}, needed is {ABI_VERSION}"
        raise NLDError(
            f"{path} was compiled for another version of vllm-nld ({found}); scripts/build_cuda.sh builds it"
        )
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


def block_attention(call: BlockAttention, *, split_limit: int = 0) -> None:
    """Write attention of every fresh token over its row's cached prefix and its own block into ``call.output``.

    Args:
        call: what to compute.
        split_limit: most pieces that a prefix is split into; 0: the operator chooses, 1: no splitting.

    Raises:
        NLDError: the tensors are unsuitable, or the kernels refuse them.
    """
    _check_attention(call)
    query, pages = call.query, call.key_pages
    struct = _BlockAttention(
        block_table=call.block_table.data_ptr(),
        block_table_stride=call.block_table.stride(0),
        prefix_lens=call.prefix_lens.data_ptr(),
        block_starts=call.block_starts.data_ptr(),
        mask_kinds=call.mask_kinds.data_ptr(),
        rows=call.prefix_lens.shape[0],
        heads=query.shape[1],
        kv_heads=call.key.shape[1],
        head_size=query.shape[2],
        page_size=pages.shape[2],
        max_length=call.max_length,
        max_prefix=call.max_prefix,
        type=_TYPES[query.dtype],
        cache_type=_TYPES[pages.dtype],
        scale=call.scale,
        k_scale=call.k_scale,
        v_scale=call.v_scale,
        split_limit=split_limit,
    )
    for name in ("query", "key", "value", "output"):
        x = getattr(call, name)
        setattr(struct, name, x.data_ptr())
        setattr(struct, f"{name}_strides", (c_int64 * 2)(*x.stride()[:2]))
    for name in ("key_page", "value_page"):
        x = getattr(call, f"{name}s")
        setattr(struct, f"{name}s", x.data_ptr())
        setattr(struct, f"{name}_strides", (c_int64 * 4)(*x.stride()))
    if call.k_scales is not None and call.v_scales is not None:
        struct.k_scales, struct.v_scales = call.k_scales.data_ptr(), call.v_scales.data_ptr()
        struct.k_scales_stride, struct.v_scales_stride = call.k_scales.stride(0), call.v_scales.stride(0)
    if query.shape[0] > 0:
        _run("nld_block_attention", struct, query.device)


def accept_prefix(drafts: Tensor, targets: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return accepted lengths, packed tokens, their starts and seeds, as docs/developer/operators.md describes them.

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
    struct = _AcceptPrefix(
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
        _check(library, library.nld_accept_prefix(byref(struct), _stream(drafts.device)))
    return accepted, tokens, token_starts, seeds


def best_tokens(logits: Tensor, with_normalizer: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's most probable token, its logit and the row's normalizer (``docs/developer/operators.md``).

    Args:
        logits: float32, bfloat16 or float16 ``[rows, vocab]``, inner stride 1.
        with_normalizer: whether to compute the normalizer; without it, the third result is ``[0]``.
    """
    check_logits(logits)
    tokens, largest, normalizers = empty_best(logits, with_normalizer)
    struct = _BestTokens(
        logits=logits.data_ptr(),
        row_stride=logits.stride(0),
        tokens=tokens.data_ptr(),
        largest=largest.data_ptr(),
        normalizers=normalizers.data_ptr() if with_normalizer else None,
        rows=logits.shape[0],
        vocab=logits.shape[1],
        type=_TYPES[logits.dtype],
    )
    if logits.shape[0] > 0:
        _run("nld_best_tokens", struct, logits.device)
    return tokens, largest, normalizers


def _run(name: str, struct: _BlockAttention | _BestTokens, device: torch.device) -> None:
    """Allocate the workspace that an operator needs, and enqueue the operator."""
    library, size = _library(), c_size_t()
    with _on(device):
        _check(library, getattr(library, f"{name}_workspace")(byref(struct), byref(size)))
        workspace = torch.empty(size.value, dtype=torch.uint8, device=device)
        struct.workspace, struct.workspace_bytes = workspace.data_ptr(), size.value
        _check(library, getattr(library, name)(byref(struct), _stream(device)))


def _check_attention(call: BlockAttention) -> None:
    for name in ("query", "key", "value", "output"):
        x = getattr(call, name)
        if x.dtype not in _TYPES or x.dtype != call.query.dtype:
            raise NLDError(f"{name} is {x.dtype}; all four must be the same of float32, bfloat16, float16")
        if x.stride(2) != 1:
            raise NLDError(f"the inner dimension of {name} must be contiguous")
    keys, values, table = call.key_pages, call.value_pages, call.block_table
    refuse_tiles(keys, "CUDA")
    if keys.dtype not in _TYPES or values.dtype != keys.dtype:
        raise NLDError(f"the cache is {keys.dtype} and {values.dtype}; both must be the same known dtype")
    for name in ("k_scales", "v_scales"):
        x = getattr(call, name)
        if x is not None and (x.dtype != torch.float32 or x.shape != call.key.shape[1:2]):
            raise NLDError(f"{name} is {x.dtype} {list(x.shape)}; needed: float32, one for each KV head")
    if table.dtype != torch.int32 or (table.shape[1] > 1 and table.stride(1) != 1):
        raise NLDError("block_table must be int32 with contiguous rows")
    _check_lists(torch.int32, prefix_lens=call.prefix_lens, block_starts=call.block_starts, mask_kinds=call.mask_kinds)


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


IMPLEMENTATION = Implementation(
    name="cuda",
    devices=("cuda",),
    block_attention=block_attention,
    accept_prefix=accept_prefix,
    best_tokens=best_tokens,
    needs="`scripts/build_cuda.sh`, or `VLLM_NLD_CUDA=ON` at installation (nvcc)",
    obstacle=unavailable,
    graph_safe=True,
)
