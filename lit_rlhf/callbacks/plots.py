"""Plots for the Images tab."""

import numpy as np
from PIL import Image, ImageDraw

from lit_rlhf.callbacks.token_image import readable_font

SIDE, LEFT, TOP = 300, 48, 36  # pixels of the square, and what stands beside it
BAR, LINE = (70, 130, 200), (214, 60, 40)


def calibration_plot(bins: np.ndarray) -> np.ndarray:
    """(height, width, 3) uint8: how often the chosen response wins, by how sure the reward model is of a winner.

    Bars on the diagonal are those of a model that is as sure as it is right; above, it is too careful, below too sure
    (Guo et al. 2017, Fig. 1, https://arxiv.org/abs/1706.04599). The depth of a bar's colour is its share of the pairs.

    Args:
        bins: (3, bins) pairs, sum of their confidences, and how many were won, from confidence 0.5 to 1.
    """
    size, confidence, won = bins
    image = Image.new("RGB", (SIDE + LEFT + 20, SIDE + TOP + 48), "white")
    draw, font = ImageDraw.Draw(image), readable_font()

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + (x - 0.5) * 2 * SIDE, TOP + (1 - y) * SIDE

    error = np.abs(won - confidence).sum() / size.sum()
    draw.text((LEFT, 8), f"accuracy by confidence, {size.sum():.0f} pairs, error {error:.3f}", font=font, fill="black")
    edges = np.linspace(0.5, 1, len(size) + 1)
    for count, right, low, high in zip(size, won, edges[:-1], edges[1:], strict=True):
        if count:
            depth = 0.25 + 0.75 * count / size.max()
            fill = tuple(round(255 + depth * (part - 255)) for part in BAR)
            (left, top), (end, bottom) = at(low, right / count), at(high, 0)
            draw.rectangle((left + 1, top, end - 1, bottom), fill=fill, outline=BAR)
    draw.line((*at(0.5, 0.5), *at(1, 1)), fill=LINE, width=2)
    draw.rectangle((*at(0.5, 1), *at(1, 0)), outline="black")
    for value in (0.5, 0.75, 1.0):
        draw.text((at(value, 0)[0] - 12, TOP + SIDE + 6), f"{value:g}", font=font, fill="black")
    for value in (0.0, 0.5, 1.0):
        draw.text((8, at(0.5, value)[1] - 8), f"{value:g}", font=font, fill="black")
    draw.text((LEFT + SIDE / 2 - 40, TOP + SIDE + 26), "confidence", font=font, fill="black")
    return np.asarray(image)
