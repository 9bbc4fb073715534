"""Tokens coloured by what the stage knows, as a picture for the Images tab."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, MARGIN, LINE, SIZE = 640, 8, 20, 14  # pixels; the panels of TensorBoard are about as wide
MOST_SAMPLES, MOST_TOKENS = 4, 96
BELOW, ABOVE = (33, 102, 220), (214, 60, 40)  # of a reading, as on the page


def token_image(samples: Sequence[dict[str, Any]]) -> np.ndarray:
    """(height, width, 3) uint8: the first samples, coloured by their first reading: blue below 0, red above.

    Args:
        samples: each {"row", "pieces", "readings"}.
    """
    samples = samples[:MOST_SAMPLES]
    by = next(iter(samples[0]["readings"]), "")
    most = reach([value for sample in samples for value in sample["readings"].get(by, ())])
    font = readable_font()
    placed = list(place(samples, by, font))
    height = max(y for _, y, *_ in placed) + LINE + MARGIN
    image = Image.new("RGB", (WIDTH, height + LINE), "white")
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN), f"{by}: blue {-most:.2f} to red {most:.2f}", font=font, fill="black")
    for x, y, text, value in placed:
        if value is not None:
            width = font.getlength(text)
            draw.rectangle((x, y + LINE, x + width, y + 2 * LINE - 3), fill=colour(value / most))
        draw.text((x, y + LINE), text, font=font, fill="dimgray" if value is None else "black")
    return np.asarray(image)


def place(samples: Sequence[dict[str, Any]], by: str, font: Any) -> Iterator[tuple[float, int, str, float | None]]:
    """Where each piece of text stands, and its reading: x, y, text; a prompt has none."""
    x, y = float(MARGIN), MARGIN
    for sample in samples:
        readings = sample["readings"].get(by, [])
        coloured = list(zip(sample["pieces"], readings, strict=True))[:MOST_TOKENS]
        words = [(f"{word} ", None) for word in sample["row"]["prompt"].split()[-MOST_TOKENS:]]
        for pieces in (words, coloured):
            for piece, value in pieces:
                text = piece.replace("\n", "⏎").replace("\t", " ")
                width = font.getlength(text)
                if x + width > WIDTH - MARGIN and x > MARGIN:
                    x, y = float(MARGIN), y + LINE
                yield x, y, text, value
                x += width
            x, y = float(MARGIN), y + LINE
        y += LINE // 2


def reach(values: Sequence[float]) -> float:
    """What counts as far from 0: more than all but 2 % of readings are."""
    finite = np.abs([value for value in values if value is not None and np.isfinite(value)])
    return float(np.quantile(finite, 0.98)) or 1.0 if len(finite) else 1.0


def colour(share: float) -> tuple[int, ...]:
    """White at 0, and at -1 and 1 the colours of the ends, three quarters of the way."""
    end, depth = (BELOW if share < 0 else ABOVE), 0.75 * min(abs(share), 1.0) if np.isfinite(share) else 0.0
    return tuple(round(255 + depth * (part - 255)) for part in end)


def readable_font() -> Any:
    """One of many scripts where the system has it, else Pillow's own of Latin letters.

    Laid out by Pillow itself: Raqm, which joins letters, fails on pieces such as halves of characters.
    """
    try:
        return ImageFont.truetype("DejaVuSans.ttf", SIZE, layout_engine=ImageFont.Layout.BASIC)
    except OSError:
        return ImageFont.load_default(SIZE)
