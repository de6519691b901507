"""The operators in C++ for the CPU (``csrc/cpu``), loaded from the compiled library; see ``vllm_nld/ops``."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vllm_nld
from vllm_nld.errors import NLDError
from vllm_nld.ops.arguments import BlockAttention
from vllm_nld.ops.implementation import Implementation

ABI_VERSION = 2
"""Of the operators' schemas; ``csrc/cpu/bindings.cpp`` has the same number."""


ARGUMENTS = BlockAttention._fields.index("output") + 1
"""Fields of a call that the operator takes."""


def native_library() -> Path | None:
    """Return the compiled CPU library's path, or None if the install is pure Python.

    An editable install keeps it in site-packages, next to the package that is in the source tree.
    """
    for folder in vllm_nld.__path__:
        path = Path(folder) / "native" / "libvllm_nld_cpu.so"
        if path.is_file():
            return path
    return None


@cache
def _load() -> str | None:
    """Load the library once; return why that failed, or None."""
    path = native_library()
    if path is None:
        return "it was not compiled at installation (no C++ compiler, or torch was not installed before)"
    load: Any = torch.ops.load_library
    try:
        load(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    library = torch.ops.vllm_nld_cpu
    version = library.abi_version() if hasattr(library, "abi_version") else 1
    if version != ABI_VERSION:
        found = f"its operators have version {version}, needed is {ABI_VERSION}"
        return f"{path} was compiled for another version of vllm-nld ({found}); install vllm-nld again"
    return None


def unavailable(device: torch.device) -> str | None:
    """Return why these operators cannot be used, or None if they can. Loads the library."""
    return f"it serves cpu, not {device.type}" if device.type != "cpu" else _load()


def instruction_set(force: str = "") -> str:
    """Return the instruction set that the operators use for bfloat16; ``force`` picks one by name, "" the best.

    Raises:
        RuntimeError: this machine lacks it, or the operators are unavailable. Names: avx512bf16, avx512, avx2,
            portable.
    """
    reason = _load()
    if reason is not None:
        raise RuntimeError(reason)
    name: str = torch.ops.vllm_nld_cpu.instruction_set(force)
    return name


def block_attention(call: BlockAttention) -> None:
    """Write attention over paged prefixes and fresh blocks into ``call.output``.

    Raises:
        RuntimeError: an argument is unsuitable; the message names it and what is allowed.
        NLDError: there are scales per head.
    """
    if call.k_scales is not None:
        raise NLDError("block_attention in C++: k_scales are per head; allowed: None, with one k_scale for all heads")
    torch.ops.vllm_nld_cpu.block_attention.default(*call[:ARGUMENTS])


def accept_prefix(drafts: Tensor, targets: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return accepted, tokens, token_starts, seeds (docs/developer/operators.md); errors as of ``block_attention``."""
    accepted: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.vllm_nld_cpu.accept_prefix.default(
        drafts, targets, starts
    )
    return accepted


def best_tokens(logits: Tensor, with_normalizer: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, largest and normalizer (``docs/developer/operators.md``); errors as of ``block_attention``."""
    best: tuple[Tensor, Tensor, Tensor] = torch.ops.vllm_nld_cpu.best_tokens.default(logits, with_normalizer)
    return best


def _fast_causal(dtype: torch.dtype) -> bool:
    """Whether it is faster than vLLM's attention in causal steps: in bfloat16, with AVX-512."""
    return dtype == torch.bfloat16 and instruction_set() in ("avx512bf16", "avx512")


IMPLEMENTATION = Implementation(
    name="cpp",
    devices=("cpu",),
    block_attention=block_attention,
    accept_prefix=accept_prefix,
    best_tokens=best_tokens,
    needs="a C++ compiler at installation",
    obstacle=unavailable,
    reads_head_scales=False,
    reads_tiles=True,
    fast_causal=_fast_causal,
    details=lambda: f"{instruction_set()} for bfloat16",
)
