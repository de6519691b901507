"""Choosing the mask token: one that the model neither reads nor writes, since NLD never predicts it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_nld.conversion.source import Vocabulary
from vllm_nld.errors import NLDError, shown_key

NEW = "new"
"""``--mask-token new``: a row of its own after the vocabulary."""
_FREE_NAMES = re.compile(r"mask|reserved|unused|placeholder|extra_id|\[PAD\d+\]", re.IGNORECASE)
_SHOWN = 12


@dataclass(frozen=True)
class MaskToken:
    """The choice.

    Attributes:
        id: the token's.
        rows: of the embedding, once the token is there.
        text: what the tokenizer calls it; None for a row that no text leads to.
    """

    id: int
    rows: int
    text: str | None


def choose(asked: str | None, vocabulary: Vocabulary, rows: int) -> MaskToken:
    """Return the mask token.

    If none is asked for: a special token whose name says that it is free; else a row of the embedding that the
    tokenizer does not reach; else a new row. Other special tokens may mean something to the model, so only the user can
    pick them.

    Args:
        asked: a special token's text, ``new``, or None.
        vocabulary: the tokenizer's special tokens.
        rows: of the embedding.

    Raises:
        NLDError: the token that is asked for is not a special token, or is in use.
    """
    free = {text: id for text, id in vocabulary.special.items() if id not in vocabulary.in_use and id < rows}
    if asked is None:
        named = [text for text in free if _FREE_NAMES.search(text)]
        if named:
            # A name with "mask" first, then in the tokenizer's order.
            text = min(named, key=lambda text: ("mask" not in text.lower(), free[text]))
            return MaskToken(free[text], rows, text)
        if vocabulary.size < rows:
            return MaskToken(vocabulary.size, rows, None)
        return MaskToken(rows, rows + 1, None)
    if asked == NEW:
        return MaskToken(rows, rows + 1, None)
    if asked not in free:
        used = (
            " is in use (begin, end, padding or chat template)"
            if asked in vocabulary.special
            else " is no special token"
        )
        names = sorted(free, key=lambda text: free[text])
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise NLDError(f"--mask-token {shown_key(asked)}{used}; allowed: {', '.join([NEW, *names[:_SHOWN]])}{more}")
    return MaskToken(free[asked], rows, asked)


def with_mask_row(embedding: Tensor, mask: MaskToken) -> Tensor:
    """Return ``[mask.rows, hidden]`` whose mask row is the mean of all rows: close to no token, of a usual size.

    The mean is taken in float64, so that it rounds alike on every machine.
    """
    mean = embedding.sum(0, dtype=torch.float64).div(len(embedding)).to(embedding.dtype)
    embedding = with_rows(embedding, mask.rows).clone()
    embedding[mask.id] = mean
    return embedding


def with_rows(head: Tensor, rows: int) -> Tensor:
    """Return ``[rows, hidden]``, zeros below what is there; the mask token's logit is never looked at."""
    return torch.cat((head, head.new_zeros(rows - len(head), head.shape[1]))) if rows > len(head) else head
