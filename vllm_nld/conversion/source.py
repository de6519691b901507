"""What a conversion reads: a model of the Llama family, whatever kind of file it lies in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vllm_nld.checkpoints.headers import Shapes, complain, differences
from vllm_nld.config import NemotronLabsDiffusionConfig
from vllm_nld.errors import NLDError

NEEDED = "a Hugging Face folder (config.json, *.safetensors, tokenizer.json) or a .gguf file"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHOWN = 3


@dataclass(frozen=True)
class Vocabulary:
    """What the choice of a mask token asks of a tokenizer.

    Attributes:
        special: text -> id of the tokens that plain text never becomes: control tokens, and those marked as unused.
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

    def config(self, **changes: Any) -> NemotronLabsDiffusionConfig:
        """Return NLD's config from the source's settings, with ``changes`` to them; it needs a ``mask_token_id``.

        Raises:
            NLDError: the config does not allow a value.
        """
        try:
            return NemotronLabsDiffusionConfig(**(self.settings | changes))
        except ValueError as error:
            raise NLDError(f"SOURCE={self.path}: {error}") from None

    def compare_shapes(self, found: Shapes, expected: Shapes, wants: str, ignored: set[str]) -> None:
        """Check the source's tensors, all by the source's names.

        Args:
            found: all tensors there are.
            expected: all that a Llama of these settings has.
            wants: says in the message what expects them.
            ignored: may be there, but are not weights of the result.

        Raises:
            NLDError: tensors are missing, misshapen or not known; the first few are named.
        """
        problems = differences(found, expected, wants)
        problems += [f"{name} belongs to no Llama" for name in sorted(found.keys() - expected.keys() - ignored)]
        complain(f"SOURCE={self.path}", problems, _SHOWN)

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
        """Return the source's own network in float32, by code that shares nothing with the conversion.

        It maps int64 ``[tokens]`` to logits ``[tokens, vocab]``. Its parameters may be rounded in place.
        """

    def check_tokenizer(self, folder: Path) -> None:  # noqa: B027  most sources have nothing to compare with
        """Compare a written tokenizer with the source's, if there is another way to load that.

        Raises:
            NLDError: they differ.
        """
