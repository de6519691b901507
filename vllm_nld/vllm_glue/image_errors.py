"""Clients' faults in images that vLLM's server would call its own (HTTP 500)."""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

DAMAGED = (SyntaxError, EOFError, struct.error, zlib.error, IndexError, KeyError)
"""What Pillow's decoders raise for damaged files besides ``OSError``, which is all that vLLM 0.32 expects."""


@contextmanager
def as_validation_error() -> Iterator[None]:
    """Turn what vLLM's loader raises for an unsuitable image into vLLM's own error for requests, HTTP 400."""
    from PIL.Image import DecompressionBombError
    from vllm.exceptions import VLLMValidationError

    try:
        yield
    except (DecompressionBombError, *DAMAGED) as error:
        raise VLLMValidationError(f"image_url: {error}", parameter="image_url") from error
    except RuntimeError as error:
        if "local files" not in str(error):
            raise
        raise VLLMValidationError(f"image_url: {error}", parameter="image_url") from error


def answer_with_400() -> None:
    """Have the server answer HTTP 400 to a damaged image, one of too many pixels, and a local file; idempotent."""
    from vllm.multimodal.media.connector import MediaConnector

    fetch, fetch_async = MediaConnector.fetch_image, MediaConnector.fetch_image_async
    if getattr(fetch, "answers_with_400", False):
        return

    @functools.wraps(fetch)
    def fetch_image(self: Any, *args: Any, **kwargs: Any) -> Any:
        with as_validation_error():
            return fetch(self, *args, **kwargs)

    @functools.wraps(fetch_async)
    async def fetch_image_async(self: Any, *args: Any, **kwargs: Any) -> Any:
        with as_validation_error():
            return await fetch_async(self, *args, **kwargs)

    fetch_image.answers_with_400 = True  # type: ignore[attr-defined]
    MediaConnector.fetch_image, MediaConnector.fetch_image_async = fetch_image, fetch_image_async
