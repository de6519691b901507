"""The text to train on: pieces of a file, and the model's own continuations."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_nld.errors import NLDError
from vllm_nld.reference import KVCache, ReferenceModel

HELD_OUT_SHARE = 0.05
_OWN_BATCH = 128


@dataclass(frozen=True)
class Stream:
    """Token streams, int64 ``[tokens]``: one to train on, one to measure on."""

    train: Tensor
    held_out: Tensor

    @classmethod
    def read(cls, data: Path, held_out: Path | None, tokenizer: Any) -> Stream:
        """Read the files; without a ``held_out`` one, the last twentieth of ``data`` is held out.

        Raises:
            NLDError: a file cannot be read, is empty, or a line of a ``.jsonl`` file has the wrong form.
        """
        found = encode(read_documents(data, "--data"), tokenizer)
        if held_out is not None:
            return cls(found, encode(read_documents(held_out, "--held-out"), tokenizer))
        cut = len(found) - max(1, int(HELD_OUT_SHARE * len(found)))
        return cls(found[:cut], found[cut:])

    def check_length(self, needed: int) -> None:
        """Check that pieces of ``needed`` tokens can be drawn.

        Raises:
            NLDError: a stream is too short.
        """
        for name, tokens in (("--data", self.train), ("held-out text", self.held_out)):
            if len(tokens) <= needed:
                raise NLDError(
                    f"{name}: {len(tokens)} tokens; allowed: more than {needed} "
                    "(--prefix-tokens, and --new-tokens with --no-own-text)"
                )


def read_documents(path: Path, option: str) -> list[str]:
    """Return the documents of a file: a whole text file, or each line's ``text`` in a ``.jsonl`` file.

    Raises:
        NLDError: the file cannot be read, holds no text, or a line has none.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NLDError(f"{option} {path}: {error}; allowed: a UTF-8 text file, or .jsonl") from None
    documents = [content]
    if path.suffix == ".jsonl":
        try:
            lines = [json.loads(line) for line in content.splitlines() if line.strip()]
            documents = [line["text"] for line in lines]
        except (ValueError, KeyError, TypeError):
            documents = [None]  # type: ignore[list-item]
        if not all(isinstance(text, str) for text in documents):
            raise NLDError(f'{option} {path}: every line must be an object such as {{"text": "..."}}')
    if not any(text.strip() for text in documents):
        raise NLDError(f"{option} {path}: the file holds no text; allowed: a UTF-8 text file, or .jsonl")
    return documents


def encode(documents: list[str], tokenizer: Any) -> Tensor:
    """Return all documents as one stream. Special tokens written in the text are encoded as such."""
    encoded = tokenizer.encode_batch(documents, add_special_tokens=False)
    return torch.tensor([token for one in encoded for token in one.ids], dtype=torch.int64)


def draw(stream: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Return int64 ``[count, length]``: pieces of the stream with random starts."""
    starts = torch.randint(len(stream) - length + 1, (count,), generator=generator)
    return stream[starts[:, None] + torch.arange(length)]


@torch.no_grad()
def continue_greedily(model: ReferenceModel, prefixes: Tensor, new_tokens: int) -> Tensor:
    """Return ``[rows, prefix + new_tokens]``: int64 ``prefixes`` and the causal pass's greedy continuations."""
    cache, columns = KVCache(), [prefixes]
    for _ in range(new_tokens):
        columns.append(model.causal(columns[-1], cache)[:, -1:].argmax(-1))
    return torch.cat(columns, dim=1)


def own_text(
    model: ReferenceModel, prefixes: Tensor, new_tokens: int, file: Path, progress: Callable[[int], None]
) -> Tensor:
    """Continue ``prefixes`` batch by batch, on the CPU. Rows that an interrupted call saved in ``file`` are used.

    Args:
        progress: called with the number of rows that were finished.
    """
    done = torch.load(file) if file.is_file() else prefixes.new_empty(0, prefixes.shape[1] + new_tokens)
    progress(len(done))
    device = model.diffusion_head.weight.device
    for part in torch.split(prefixes[len(done) :], _OWN_BATCH):
        done = torch.cat((done, continue_greedily(model, part.to(device), new_tokens).cpu()))
        save(file, done)
        progress(len(part))
    return done


def save(file: Path, content: Any) -> None:
    """Save with ``torch.save`` and rename, so that an interrupted save does no harm."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".part")
    torch.save(content, temporary)
    temporary.replace(file)
