"""The text to train on: pieces of a file, and the model's own continuations."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vllm_nld.errors import NLDError
from vllm_nld.reference import ReferenceModel, RoomyKVCache
from vllm_nld.training.settings import Settings

HELD_OUT_SHARE = 0.05
_OWN_BATCH = 128
_OWN_BATCH_CACHE, _OWN_BATCH_SHARE = 1 << 34, 0.4
"""Bytes of keys and values of a batch of own text on a GPU, which needs many rows to be busy; and of what is free."""


@dataclass(frozen=True)
class Rows:
    """Texts that drafts are made in, each after a prefix of its own.

    Attributes:
        ids: int64 ``[rows, length]``; what follows the longest text is padding.
        begins: int64 ``[rows]``, where the texts begin, which is the length of their prefixes.
    """

    ids: Tensor
    begins: Tensor

    @classmethod
    def even(cls, ids: Tensor, prefix: int) -> Rows:
        """Return texts that all begin at ``prefix``."""
        return cls(ids, torch.full((len(ids),), prefix, device=ids.device))

    @classmethod
    def of(cls, prefixes: list[Tensor], texts: list[Tensor], new_tokens: int, pad: int) -> Rows:
        """Lay each prefix and its text end to end; there is room for ``new_tokens`` after the longest prefix."""
        whole = [torch.cat(pair) for pair in zip(prefixes, texts, strict=True)]
        ids = pad_sequence(whole, batch_first=True, padding_value=pad)
        longest = max(map(len, prefixes))
        return cls(widened(ids, longest + new_tokens, pad), torch.tensor([len(prefix) for prefix in prefixes]))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, which: Tensor | slice) -> Rows:
        return Rows(self.ids[which], self.begins[which])

    def lengths(self, eos: frozenset[int]) -> Tensor:
        """Return how many tokens each text has before an id of ``eos`` ends it, int64 ``[rows]``."""
        places = torch.arange(self.ids.shape[1], device=self.ids.device)
        ends = torch.isin(self.ids, torch.tensor(sorted(eos), dtype=self.ids.dtype, device=self.ids.device))
        after = torch.where(ends & (places >= self.begins[:, None]), places, len(places))
        return after.amin(1) - self.begins

    def trimmed(self, new_tokens: int, multiple: int = 1) -> Rows:
        """Return the rows up to ``new_tokens`` after the longest prefix, and on to a ``multiple`` where they reach."""
        end = int(self.begins.max()) + new_tokens
        return Rows(self.ids[:, : -(-end // multiple) * multiple], self.begins)

    def split(self, size: int) -> list[Rows]:
        """Return pieces of at most ``size`` rows."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def to(self, device: str | torch.device) -> Rows:
        """Return them on another device."""
        return Rows(self.ids.to(device), self.begins.to(device))


class Corpus(ABC):
    """Where texts come from: one part to train on, one to measure on; each part is whatever the corpus reads it as.

    Attributes:
        answers: whether every text ends with an end-of-sequence token.
    """

    train: Any
    held_out: Any
    answers: ClassVar[bool]

    @abstractmethod
    def check(self, settings: Settings) -> None:
        """Check that there is enough.

        Raises:
            NLDError: there is not; names the options.
        """

    @abstractmethod
    def rows(self, part: Any, count: int, prefix: int, new_tokens: int, pad: int, generator: torch.Generator) -> Rows:
        """Return at most ``count`` texts of a part, chosen at random.

        Args:
            part: ``train`` or ``held_out``.
            count: of rows.
            prefix: the most tokens in front of a text.
            new_tokens: of the data's own text; 0: prefixes only.
            pad: fills shorter rows up.
            generator: of the choice.
        """

    @abstractmethod
    def digest(self, part: Any) -> str:
        """Return a fingerprint of a part."""


@dataclass(frozen=True)
class Stream(Corpus):
    """Running text as token streams, int64 ``[tokens]``."""

    answers: ClassVar[bool] = False
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

    def check(self, settings: Settings) -> None:
        """Check that pieces can be drawn that are as long as ``settings`` want them."""
        needed = settings.prefix_tokens + (0 if settings.own_text else settings.new_tokens)
        for name, tokens in (("--data", self.train), ("held-out text", self.held_out)):
            if len(tokens) <= needed:
                raise NLDError(
                    f"{name}: {len(tokens)} tokens; allowed: more than {needed} "
                    "(--prefix-tokens, and --new-tokens with --no-own-text)"
                )

    def rows(
        self, part: Tensor, count: int, prefix: int, new_tokens: int, pad: int, generator: torch.Generator
    ) -> Rows:
        """Return pieces that begin anywhere in the stream."""
        return Rows.even(draw(part, count, prefix + new_tokens, generator), prefix)

    def digest(self, part: Tensor) -> str:
        """Return a hash of the tokens."""
        return digest(part)


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


def most_probable(logits: Tensor) -> Tensor:
    """Return the most probable token of each row, int64 ``[...]`` for logits ``[..., vocab]``."""
    return logits.argmax(-1)


@torch.no_grad()
def continue_greedily(
    model: ReferenceModel,
    prefixes: Tensor,
    new_tokens: int,
    begins: Tensor | None = None,
    choose: Callable[[Tensor], Tensor] = most_probable,
) -> Tensor:
    """Return int64 ``prefixes`` and the causal pass's greedy continuations, ``[rows, longest prefix + new_tokens]``.

    Args:
        model: that continues.
        prefixes: int64 ``[rows, longest prefix]``.
        new_tokens: of the row with the longest prefix; the others have some more.
        begins: int64 ``[rows]``, the prefixes' lengths, the longest of them that of ``prefixes``; None: all are equal.
        choose: chooses tokens, int64 ``[rows, 1]``, by logits ``[rows, 1, vocab]``.
    """
    length = prefixes.shape[1]
    shortest = length if begins is None else int(begins.min())
    cache, columns = RoomyKVCache(length + new_tokens), [prefixes[:, :shortest]]
    for place in range(shortest, length + new_tokens):
        written = choose(model.logits(model.causal_hidden(columns[-1], cache)[:, -1:]))
        if begins is not None and place < length:
            written = torch.where(place < begins[:, None], prefixes[:, place : place + 1], written)
        columns.append(written)
    return torch.cat(columns, dim=1)


def own_text(
    model: ReferenceModel, prefixes: Rows, new_tokens: int, pad: int, file: Path, progress: Callable[[int], None]
) -> Rows:
    """Continue ``prefixes`` batch by batch. Rows that an interrupted call saved in ``file`` are used.

    The rows are on the CPU, whatever the model's device is.

    Args:
        model: that continues.
        prefixes: rows without a text; neighbors of like length are the cheapest.
        new_tokens: of each text.
        pad: fills shorter rows up.
        file: keeps what is ready.
        progress: called with the number of rows that were finished.
    """
    length = prefixes.ids.shape[1] + new_tokens
    done = torch.load(file) if file.is_file() else prefixes.ids.new_empty(0, length)
    progress(len(done))
    device = model.diffusion_head.weight.device
    for part in prefixes[len(done) :].split(own_batch(model, length)):
        begins, longest = part.begins.to(device), int(part.begins.max())
        found = continue_greedily(model, part.ids[:, :longest].to(device), new_tokens, begins).cpu()
        found[torch.arange(found.shape[1]) >= part.begins[:, None] + new_tokens] = pad
        done = torch.cat((done, widened(found, length, pad)))
        save(file, done)
        progress(len(part))
    return Rows(done, prefixes.begins)


def own_batch(model: ReferenceModel, length: int) -> int:
    """Return how many rows of ``length`` tokens are continued at once."""
    weight, config = model.diffusion_head.weight, model.config
    if not weight.is_cuda:
        return _OWN_BATCH
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * weight.element_size()
    room = min(_OWN_BATCH_CACHE, int(_OWN_BATCH_SHARE * torch.cuda.mem_get_info(weight.device)[0]))
    return max(1, room // (token * length))


def widened(ids: Tensor, length: int, pad: int) -> Tensor:
    """Return ``ids`` ``[rows, shorter]`` as ``[rows, length]``."""
    return F.pad(ids, (0, length - ids.shape[1]), value=pad)


def digest(*tensors: Tensor) -> str:
    """Return a hash of tensors on the CPU."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def save(file: Path, content: Any) -> None:
    """Save with ``torch.save`` and rename, so that an interrupted save does no harm."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".part")
    torch.save(content, temporary)
    temporary.replace(file)
