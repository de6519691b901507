"""What a conversion reads: a model of the Llama family, whatever kind of file it lies in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NEEDED = "a Hugging Face folder (config.json, *.safetensors, tokenizer.json) or a .gguf file"


@dataclass(frozen=True)
class Vocabulary:
    """What the choice of a mask token asks of a tokenizer.

    Attributes:
        special: text -> id of the tokens that text is not cut into: control tokens, and those marked as unused.
        in_use: those ids among them that the model is fed with or writes: begin, end, padding, the chat template's.
        size: ids that the tokenizer knows, the highest + 1; the embedding may have more rows.
    """

    special: dict[str, int]
    in_use: frozenset[int]
    size: int


class Source(ABC):
    """A model to convert. Opening one checks all but the weights' values.

    Attributes:
        path: folder or file, as the user gave it.
        settings: what ``config.json`` of the result says, but for mask token, block length and dtype.
        vocabulary: the tokenizer's special tokens.
        dtype: that of the weights; bfloat16 where they are quantized.
    """

    path: Path
    settings: dict[str, Any]
    vocabulary: Vocabulary
    dtype: torch.dtype

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """Return a weight by its NLD name, in the source's own precision, or float32 if that is quantized.

        Raises:
            NLDError: it cannot be read.
        """

    @abstractmethod
    def write_tokenizer(self, folder: Path) -> None:
        """Write tokenizer, chat template and generation defaults in Hugging Face layout."""

    @abstractmethod
    def network(self) -> nn.Module:
        """Return the source's own network in float32, of code that has nothing to do with the conversion.

        It maps int64 ``[tokens]`` to logits ``[tokens, vocab]``. Its parameters may be rounded in place.
        """

    def check_tokenizer(self, folder: Path) -> None:  # noqa: B027  most sources have nothing to compare with
        """Compare a written tokenizer with the source's, if there is another way to load that.

        Raises:
            NLDError: they differ.
        """
