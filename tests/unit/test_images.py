"""Images before the network: grid, pixels and tokens, against published vectors, OpenCV and another implementation."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vllm_nld.vision.images import MAX_IMAGE_SIZE, Grid, grid_of, on_white, pixels_of, tokens_of

CELL = 28


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values).convert(mode)


@pytest.mark.parametrize(
    ("size", "cells"),
    [
        ((300, 200), (11, 8)),
        ((28, 28), (1, 1)),
        ((29, 1), (2, 1)),
        ((2800, 1400), (50, 25)),
        ((4201, 3), (50, 1)),  # the shorter side rounds to 1
        ((1, 1), (1, 1)),
        ((1400, 1400), (50, 50)),
        ((100_000, 1), (50, 1)),  # the shorter side would round to 0
        ((2800, 113), (50, 2)),  # 56.5 pixels: to the even 56, so two rows
        ((2800, 115), (50, 3)),  # 57.5 to 58
        ((2000, 41), (50, 2)),  # 28.7 to 29, which takes a second row; Pixtral's own arithmetic would cut it to 28
    ],
)
def test_grids(size: tuple[int, int], cells: tuple[int, int]) -> None:
    assert grid_of(*size, MAX_IMAGE_SIZE, CELL) == cells
    assert grid_of(*reversed(size), MAX_IMAGE_SIZE, CELL) == tuple(reversed(cells))


def test_the_longest_side_is_an_option() -> None:
    assert grid_of(1400, 700, 280, CELL) == (10, 5)


@pytest.mark.parametrize("size", [(28, 28), (300, 200), (1, 1), (3, 200), (1500, 40)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "1"])
def test_pixels_equal_those_of_the_encoder_that_the_released_code_was_ported_from(
    size: tuple[int, int], mode: str
) -> None:
    """The released ``image_processing.py`` is a port of mistral_common's encoder."""
    from mistral_common.tokens.tokenizers.image import transform_image

    image = picture(*size, mode)
    grid = grid_of(*size, MAX_IMAGE_SIZE, CELL)
    pixels = pixels_of(image, MAX_IMAGE_SIZE, CELL)
    assert pixels.dtype == np.float32
    assert pixels.shape == (3, grid.rows * CELL, grid.columns * CELL)
    expected: NDArray[np.float32] = transform_image(image, (grid.columns * CELL, grid.rows * CELL))
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=1e-5)


def test_pixels_are_resized_without_smoothing() -> None:
    """OpenCV's cubic weights at half a pixel, of the four nearest pixels: others have no part."""
    row = np.zeros((1, 112), np.uint8)
    row[0, 56:] = 255
    image = Image.fromarray(np.repeat(np.repeat(row, 28, 0)[..., None], 3, 2))
    red = pixels_of(image, 56, CELL)[0, 14] * 0.26862954 + 0.48145466
    # 112 pixels become 56: places 27 and 28 lie half a pixel from those at the edge.
    np.testing.assert_allclose(red[26:30], [0, -0.09375, 1.09375, 1], atol=1e-5)


def test_what_is_transparent_becomes_white() -> None:
    image = Image.new("RGBA", (28, 28), (255, 0, 0, 0))
    assert on_white(image).getpixel((0, 0)) == (255, 255, 255)
    assert on_white(Image.new("LA", (28, 28), (0, 128))).getpixel((0, 0)) == (127, 127, 127)
    palette = Image.new("P", (28, 28), 0)
    palette.info["transparency"] = 0
    assert on_white(palette).getpixel((0, 0)) == (255, 255, 255)


def test_tokens_close_every_row() -> None:
    assert tokens_of(Grid(3, 2), (18, 19, 20, 21)) == [18, 19, 19, 19, 20, 19, 19, 19, 21]
    assert tokens_of(Grid(1, 1), (3, 4, 5, 6)) == [3, 4, 6]
    for grid in (Grid(50, 50), Grid(50, 1), Grid(1, 50)):
        tokens = tokens_of(grid, (18, 19, 20, 21))
        assert len(tokens) == grid.tokens
        assert tokens.count(19) == grid.embeddings
    assert Grid(50, 50).tokens == 2551
