"""Product images of the synthetic shop: colours and pattern of the style, and an uninformative silhouette."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from missrec_t4r.etl.sources.synthetic.shop_text import Style

SIDE = 48
"""Pixels."""

Colour = tuple[int, int, int]


def draw(style: Style, rng: np.random.Generator) -> Image.Image:
    """Return an image of the style; colours, spacing and silhouette vary at random."""
    background, accent = _vary(style.background, rng), _vary(style.accent, rng)
    image = Image.new("RGB", (SIDE, SIDE), background)
    canvas = ImageDraw.Draw(image)
    soft = _mix(background, accent, 0.45)
    _PATTERNS[style.pattern](canvas, soft, int(rng.integers(6, 10)))
    _silhouette(canvas, accent, rng)
    return image


def _silhouette(canvas: ImageDraw.ImageDraw, colour: Colour, rng: np.random.Generator) -> None:
    left, top = rng.integers(8, 16, 2).tolist()
    right, bottom = (SIDE - rng.integers(8, 16, 2)).tolist()
    shape = int(rng.integers(4))
    if shape == 0:
        canvas.ellipse((left, top, right, bottom), fill=colour)
    elif shape == 1:
        canvas.rectangle((left, top, right, bottom), fill=colour)
    elif shape == 2:
        canvas.polygon([(left, bottom), ((left + right) // 2, top), (right, bottom)], fill=colour)
    else:
        canvas.rounded_rectangle((left, top, right, bottom), radius=7, fill=colour)


def _plain(canvas: ImageDraw.ImageDraw, colour: Colour, step: int) -> None:
    canvas.line((0, SIDE - step, SIDE, SIDE - step), fill=colour)


def _grid(canvas: ImageDraw.ImageDraw, colour: Colour, step: int) -> None:
    for at in range(0, SIDE, step):
        canvas.line((at, 0, at, SIDE), fill=colour)
        canvas.line((0, at, SIDE, at), fill=colour)


def _stripes(canvas: ImageDraw.ImageDraw, colour: Colour, step: int) -> None:
    for at in range(-SIDE, SIDE, step):
        canvas.line((at, SIDE, at + SIDE, 0), fill=colour, width=3)


def _waves(canvas: ImageDraw.ImageDraw, colour: Colour, step: int) -> None:
    for at in range(0, SIDE, step):
        points = [(x, at + round(3 * float(np.sin(x / 4)))) for x in range(SIDE)]
        canvas.line(points, fill=colour, width=2)


def _dots(canvas: ImageDraw.ImageDraw, colour: Colour, step: int) -> None:
    for x in range(step // 2, SIDE, step):
        for y in range(step // 2, SIDE, step):
            canvas.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)


def _rings(canvas: ImageDraw.ImageDraw, colour: Colour, step: int) -> None:
    for radius in range(step, SIDE, step):
        middle = SIDE // 2
        canvas.ellipse((middle - radius, middle - radius, middle + radius, middle + radius), outline=colour, width=2)


_PATTERNS = {"plain": _plain, "grid": _grid, "stripes": _stripes, "waves": _waves, "dots": _dots, "rings": _rings}


def _vary(colour: Colour, rng: np.random.Generator) -> Colour:
    red, green, blue = np.clip(np.array(colour) + rng.integers(-18, 19, 3), 0, 255).tolist()
    return red, green, blue


def _mix(first: Colour, second: Colour, share: float) -> Colour:
    red, green, blue = (round(a * (1 - share) + b * share) for a, b in zip(first, second, strict=True))
    return red, green, blue
