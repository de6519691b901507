"""Pictures for the tiny vision-language model: one to three equal shapes and a digit, and what to say about them.

A picture has four corners; each object is in one of them, with its own size, at a random point of the grid of patches
(which a model this small could not do without), jittered. A combination is a count, a color, a shape and a digit; one
digit of each (count, color, shape) is held out: no picture of training shows it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COUNTS = ("one", "two", "three")
COLORS = {"red": (214, 40, 40), "green": (30, 150, 60), "blue": (40, 80, 220), "yellow": (240, 200, 20)}
SHAPES = ("circle", "square", "triangle", "star")
"""Of the vocabulary. No picture shows a square: a model this small took circles for squares."""
SHOWN = ("circle", "triangle", "star")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
SHORT, LONG = "What is in the picture?", "Describe the picture."
QUESTIONS = (SHORT, LONG)
SIZES = ((56, 56), (84, 56), (56, 84), (84, 84))
"""Width and height in pixels, multiples of 28, so that nothing is resized. Objects are as large in all of them."""
OBJECT = 14
"""Half the side of the square that an object fits in, in pixels; as large as a patch."""
JITTER = 2.5
"""Pixels by which an object's center is off the grid of patches, at most."""


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
        color, shape: of every shape.
        digit: 0 to 9.
        corners: of the shapes, ascending, then of the digit; indices into ``CORNERS``.
    """

    color: str
    shape: str
    digit: int
    corners: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of shapes."""
        return len(self.corners) - 1

    def short(self) -> str:
        """Return the short caption, such as ``two red circles and 7``."""
        return f"{COUNTS[self.count - 1]} {self.color} {self.shape}{'s' if self.count > 1 else ''} and {self.digit}"

    def long(self) -> str:
        """Return the caption that says where things are, corner by corner."""
        names = ["nothing"] * len(CORNERS)
        for corner in self.corners[:-1]:
            names[corner] = f"a {self.color} {self.shape}"
        names[self.corners[-1]] = f"the digit {self.digit}"
        places = [f"{name} at the {corner}" for name, corner in zip(names, CORNERS, strict=True)]
        return f"There is {', '.join(places[:-1])} and {places[-1]}."

    def answer(self, question: str) -> str:
        """Return the caption that a question of ``QUESTIONS`` asks for."""
        return {SHORT: self.short, LONG: self.long}[question]()


def is_held_out(count: int, color: int, shape: int, digit: int) -> bool:
    """Whether no training picture shows this combination (of 1 to 3, indices of color and shape, and 0 to 9)."""
    return (7 * count + 3 * color + 5 * shape + digit) % 10 == 0


def combinations(held_out: bool) -> list[tuple[int, int, int, int]]:
    """Return the held-out combinations, or all others."""
    every = product((1, 2, 3), range(len(COLORS)), range(len(SHAPES)), range(10))
    return [combination for combination in every if is_held_out(*combination) == held_out]


_COMBINATIONS = {held_out: combinations(held_out) for held_out in (False, True)}


def draw_scene(rng: random.Random, held_out: bool, shapes: tuple[str, ...] = SHOWN) -> Scene:
    """Return a random scene, of the held-out combinations or of all others."""
    count, color, shape, digit = rng.choice(_COMBINATIONS[held_out])
    while SHAPES[shape] not in shapes:
        count, color, shape, digit = rng.choice(_COMBINATIONS[held_out])
    places = rng.sample(range(len(CORNERS)), count + 1)
    return Scene(list(COLORS)[color], SHAPES[shape], digit, (*sorted(places[:count]), places[count]))


def render(scene: Scene, size: tuple[int, int], rng: random.Random) -> Image.Image:
    """Return an RGB picture of ``size`` (width, height) in pixels; sizes, places and shades are drawn from ``rng``."""
    scale = 4  # drawn larger and shrunk, for smooth edges
    shade = rng.randint(225, 255)
    picture = Image.new("RGB", (size[0] * scale, size[1] * scale), (shade, shade, shade))
    pen = ImageDraw.Draw(picture)
    for index, corner in enumerate(scene.corners):
        width, height = (side * scale / 2 for side in size)
        is_digit = index == scene.count
        radius = OBJECT * scale * (rng.uniform(0.72, 0.88) if is_digit else rng.uniform(0.60, 0.84))
        x = (corner % 2) * width + _place(width / scale, radius / scale, rng) * scale
        y = (corner // 2) * height + _place(height / scale, radius / scale, rng) * scale
        if is_digit:
            dark = rng.randint(0, 60)
            font = ImageFont.load_default(size=2.4 * radius)
            pen.text((x, y), str(scene.digit), (dark,) * 3, font, anchor="mm", stroke_width=scale // 2)
        else:
            color = tuple(min(255, max(0, part + rng.randint(-12, 12))) for part in COLORS[scene.color])
            _draw_shape(pen, scene.shape, x, y, radius, color)
    return picture.resize(size, Image.Resampling.LANCZOS)


def _place(side: float, radius: float, rng: random.Random) -> float:
    """Return a center, in pixels from the begin of a corner with this side, at which an object fits in the corner.

    Near a corner of patches: what a model learns about one place is true at all others.
    """
    jitter = min(JITTER, OBJECT - radius)
    return OBJECT * rng.randint(1, int(side) // OBJECT - 1) + rng.uniform(-jitter, jitter)


def _draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, color: tuple[int, ...]
) -> None:
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    elif shape == "square":
        side = 0.85 * radius
        # An outline: patches this large make a small model take a full square for a circle.
        pen.rectangle((x - side, y - side, x + side, y + side), outline=color, width=int(0.4 * radius))
    elif shape == "triangle":
        pen.polygon(_corners(x, y, [radius] * 3), fill=color)
    else:
        pen.polygon(_corners(x, y, [radius, 0.42 * radius] * 5), fill=color)


def _corners(x: float, y: float, radii: list[float]) -> list[tuple[float, float]]:
    angles = 2 * np.pi * np.arange(len(radii)) / len(radii) - np.pi / 2
    return [(x + r * float(np.cos(a)), y + r * float(np.sin(a))) for r, a in zip(radii, angles, strict=True)]
