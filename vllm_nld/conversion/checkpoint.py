"""The conversion: choose a mask token, write a folder next to its place, compare it with the source, move it there."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vllm_nld.checkpoints.headers import HEAD, Shapes, expected_tensors
from vllm_nld.config import NemotronLabsDiffusionConfig
from vllm_nld.conversion import check, mask_token
from vllm_nld.conversion.check import Agreement
from vllm_nld.conversion.mask_token import MaskToken
from vllm_nld.conversion.source import DTYPES, Source
from vllm_nld.errors import NLDError, shown_key
from vllm_nld.names import ARCHITECTURE

EMBEDDING = "encoder.embed_tokens.weight"
SHARD_BYTES = 4 << 30
REPORT = "conversion.json"

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done and steps in all."""


@dataclass(frozen=True)
class Options:
    """What a user may choose.

    Attributes:
        mask_token: a special token's text, ``new``, or None for what is free.
        block_length: tokens of a diffusion block.
        dtype: of the written weights, or None for the source's.
        check: compare logits with the source's; takes the memory of the model in float32.
    """

    mask_token: str | None = None
    block_length: int = 16
    dtype: str | None = None
    check: bool = True


@dataclass(frozen=True)
class Result:
    """What was written, as ``conversion.json`` has it."""

    source: str
    parameters: int
    bytes: int
    dtype: str
    tied: bool
    block_length: int
    mask_token_id: int
    mask_token: str | None
    agreement: Agreement | None


def check_target(folder: Path, options: Options) -> None:
    """Check what can be checked before the source is read.

    Raises:
        NLDError: the folder exists, or the dtype is unknown.
    """
    if options.dtype is not None and options.dtype not in DTYPES:
        raise NLDError(f"--dtype {shown_key(options.dtype)}: allowed are {', '.join(DTYPES)}")
    if folder.exists():
        raise NLDError(f"FOLDER={folder}: is there already; allowed: a folder that does not exist yet")


def convert(source: Source, folder: Path, options: Options, progress: Progress = lambda *_: None) -> Result:
    """Write an NLD checkpoint of ``source``.

    Raises:
        NLDError: the folder exists, an option does not suit, or the result does not compute what the source does.
            Nothing is written then.
    """
    check_target(folder, options)
    dtype = DTYPES[options.dtype] if options.dtype else source.dtype
    mask = mask_token.choose(options.mask_token, source.vocabulary, source.settings["vocab_size"])
    config = _config(source, mask, options.block_length, dtype)
    with _next_to(folder) as new:
        config.save_pretrained(new)
        source.write_tokenizer(new)
        written = _write_weights(source, new, config, mask, dtype, progress)
        source.check_tokenizer(new)
        agreement = _compare(source, new, mask, dtype, progress) if options.check else None
        result = Result(
            source=source.path.name,
            parameters=sum(shape.numel() for shape in map(torch.Size, expected_tensors(config).values())),
            bytes=written,
            dtype=str(dtype).removeprefix("torch."),
            tied=config.tie_word_embeddings,
            block_length=options.block_length,
            mask_token_id=mask.id,
            mask_token=mask.text,
            agreement=agreement,
        )
        _write_json(new / REPORT, asdict(result))
    return result


@contextmanager
def _next_to(folder: Path) -> Iterator[Path]:
    """Yield an empty folder next to ``folder``; it takes that place in the end, or is removed if that fails."""
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
    except OSError as error:
        raise NLDError(f"FOLDER={folder}: cannot be made: {error}") from None
    try:
        new.chmod(0o755)  # mkdtemp's is only for its owner
        yield new
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _config(source: Source, mask: MaskToken, block_length: int, dtype: torch.dtype) -> NemotronLabsDiffusionConfig:
    return source.config(
        architectures=[ARCHITECTURE],
        dtype=str(dtype).removeprefix("torch."),
        vocab_size=mask.rows,
        mask_token_id=mask.id,
        block_size=block_length,
    )


def _write_weights(
    source: Source,
    folder: Path,
    config: NemotronLabsDiffusionConfig,
    mask: MaskToken,
    dtype: torch.dtype,
    progress: Progress,
) -> int:
    """Write the tensors, one file after the other, and an index if there are several; return their bytes."""
    shards = shards_of(expected_tensors(config), dtype.itemsize, SHARD_BYTES)
    total, done = sum(map(len, shards)), 0
    homes: dict[str, str] = {}
    written = 0
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors[name] = _prepared(name, source.tensor(name).to(dtype), mask).contiguous()
            done += 1
            progress("converting", done, total)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors makes it only for its owner
        homes |= dict.fromkeys(names, file)
        written += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": written}, "weight_map": homes})
    return written


def _prepared(name: str, tensor: Tensor, mask: MaskToken) -> Tensor:
    if name == EMBEDDING:
        return mask_token.with_mask_row(tensor, mask)
    return mask_token.with_rows(tensor, mask.rows) if name == HEAD else tensor


def shards_of(shapes: Shapes, itemsize: int, limit: int) -> list[list[str]]:
    """Split tensor names into files of at most ``limit`` bytes; a tensor larger than that has its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        bytes = torch.Size(shape).numel() * itemsize
        if shards[-1] and size + bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes
    return shards


def _compare(source: Source, folder: Path, mask: MaskToken, dtype: torch.dtype, progress: Progress) -> Agreement:
    progress("comparing", 0, 2)
    ids = check.prompts(folder, mask, source.settings["vocab_size"], source.settings["max_position_embeddings"])
    plain, rounded = check.source_logits(source.network(), dtype, ids)
    progress("comparing", 1, 2)
    agreement = check.compare(folder, plain, rounded, ids, mask)
    progress("comparing", 2, 2)
    return agreement


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
