"""The released arithmetic of images: their grid of cells, their pixels, and the tokens that stand for them.

A cell is a square of 28 pixels in the released model: 2 by 2 patches, which become one embedding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_IMAGE_SIZE = 1400
"""Pixels of the longer side that an image is shrunk to, unless an option says otherwise."""

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training images, red, green and blue in [0, 1]."""


class Grid(NamedTuple):
    """The cells of an image."""

    columns: int
    rows: int

    @property
    def embeddings(self) -> int:
        return self.columns * self.rows

    @property
    def tokens(self) -> int:
        """How many tokens stand for the image: a start, and in each row its cells and a break, or the end."""
        return 1 + self.rows * (self.columns + 1)


def grid_of(width: int, height: int, longest: int, cell: int) -> Grid:
    """Return the grid of an image.

    Args:
        width: of the image, in pixels.
        height: of the image, in pixels.
        longest: a longer side shrinks to this many pixels.
        cell: side of a cell, in pixels.
    """
    ratio = max(width / longest, height / longest)
    if ratio > 1:
        width, height = round(width / ratio), round(height / ratio)  # Python's: a half goes to the even number
    return Grid(*(-(-max(side, 1) // cell) for side in (width, height)))


def pixels_of(image: Image, longest: int, cell: int) -> NDArray[np.float32]:
    """Return what the tower reads, float32 ``[3, height, width]``: the image resized to its cells, normalized.

    Args:
        image: in any of Pillow's modes. What is transparent becomes white.
        longest: as for :func:`grid_of`.
        cell: as for :func:`grid_of`.
    """
    import cv2

    grid = grid_of(image.width, image.height, longest, cell)
    size = (grid.columns * cell, grid.rows * cell)
    planes = np.empty((3, size[1], size[0]), np.float32)
    # One channel at a time, because the floats of a large photograph need much memory.
    opaque = on_white(image)
    for index, (plane, mean, deviation) in enumerate(zip(planes, MEAN, DEVIATION, strict=True)):
        channel = np.asarray(opaque.getchannel(index), np.float32)
        values: Any = cv2.resize(channel, size, interpolation=cv2.INTER_CUBIC)
        plane[:] = (values / np.float32(255) - np.float32(mean)) / np.float32(deviation)
    return planes


def on_white(image: Image) -> Image:
    """Return an image in RGB, on a white ground where it is transparent."""
    if image.mode == "RGB":
        return image
    from PIL import Image as Images

    layer = image.convert("RGBA")
    ground = Images.new("RGBA", image.size, "white")
    ground.paste(layer, (0, 0), layer)
    return ground.convert("RGB")


def tokens_of(grid: Grid, ids: tuple[int, int, int, int]) -> list[int]:
    """Return the tokens that stand for an image; each pad is replaced by an embedding, row by row.

    Args:
        grid: of the image.
        ids: of start, pad, break and end, as ``NemotronLabsDiffusionVLMConfig.image_token_ids`` has them.
    """
    start, pad, row_break, end = ids
    tokens = [start, *([pad] * grid.columns + [row_break]) * grid.rows]
    tokens[-1] = end
    return tokens
