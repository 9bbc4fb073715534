"""Episodes as pictures, for videos: their text, drawn by Pillow, which is imported when the first one is asked for."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.error import DependencyNotInstalled

COLUMNS, ROWS = 80, 24  # of characters; every picture has the same size, as a video needs it
FONT_SIZE = 16
FONTS = ("DejaVuSansMono.ttf", "LiberationMono-Regular.ttf", "Menlo.ttc", "consola.ttf")  # where the system has one
LABEL = 11  # characters before the text of a line, as `rendering` writes them
DARK, LIGHT = (24, 24, 24), (230, 230, 230)


def picture(text: str) -> npt.NDArray[np.uint8]:
    """Text as an RGB picture (H, W, 3): long lines are wrapped, and the last `ROWS` lines are shown, as in a terminal.

    A character that the font lacks is written as its code, as Python's "unicode_escape" has it.

    Args:
        text: labelled lines, as `rendering.episode_text` writes them.

    Raises:
        DependencyNotInstalled: there is no Pillow.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise DependencyNotInstalled(
            f"render_mode 'rgb_array' draws with Pillow, which cannot be imported ({error}); run `pip install pillow`"
        ) from error
    font, width, height = _font()
    image = Image.new("RGB", (COLUMNS * width, ROWS * height), DARK)
    canvas = ImageDraw.Draw(image)
    for row, line in enumerate(_wrapped(text)[-ROWS:]):
        for column, character in enumerate(line):  # each in the middle of its cell, whatever the widths in the font
            if character != " ":
                left = column * width + (width - font.getlength(character)) // 2
                canvas.text((left, row * height), character, LIGHT, font)
    return np.asarray(image).copy()  # writable, as agents expect


def _wrapped(text: str) -> list[str]:
    lines = []
    bar = "│" if _is_drawn("│") else "|"
    for line in text.replace("│", bar).split("\n"):
        line = "".join(c if _is_drawn(c) else c.encode("unicode_escape").decode("ascii") for c in line)
        lines.append(line[:COLUMNS])
        room = COLUMNS - LABEL
        lines += [f"{'':8} {bar} {line[start : start + room]}" for start in range(COLUMNS, len(line), room)]
    return lines


@cache
def _font() -> tuple[Any, int, int]:
    """A font, and the cell that each of its characters gets: width and height in pixels."""
    from PIL import ImageFont

    font: Any = None
    for name in FONTS:
        try:
            font = ImageFont.truetype(name, FONT_SIZE)
            break
        except OSError:
            continue
    font = font or ImageFont.load_default(FONT_SIZE)
    width, height = max(font.getlength("M"), font.getlength("W")), sum(font.getmetrics())
    return font, -(-int(width) // 2) * 2, height


@cache
def _is_drawn(character: str) -> bool:
    """Whether the font has this character; what it lacks, it draws all alike, as an empty box."""
    font, _, _ = _font()
    missing = font.getmask("\uffff")
    return character.isprintable() and bytes(font.getmask(character)) != bytes(missing)
