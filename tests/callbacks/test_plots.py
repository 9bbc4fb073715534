"""The calibration of a reward model as a picture."""

import numpy as np

from lit_rlhf.callbacks.plots import BAR, LEFT, SIDE, TOP, calibration_plot

SIZE = np.array([10.0, 0, 0, 0, 0, 0, 0, 0, 0, 40.0])
CONFIDENCE = SIZE * np.array([0.5, *[0.0] * 8, 0.95])


def height(image, number):
    """Of a bar, as a share of the square: from its foot up to where it is white again."""
    x = LEFT + round((number + 0.5) / 10 * SIDE)
    column = image[TOP + 2 : TOP + SIDE - 2, x]
    blue = (column[:, 2].astype(int) - column[:, 0]) > 10
    return blue.mean()


def test_a_bar_is_as_high_as_the_share_that_was_won_and_empty_bins_have_none():
    image = calibration_plot(np.array([SIZE, CONFIDENCE, SIZE * 0.5]))
    assert abs(height(image, 0) - 0.5) < 0.05 and abs(height(image, 9) - 0.5) < 0.05
    assert height(image, 4) == 0


def test_bins_of_more_pairs_are_darker():
    image = calibration_plot(np.array([SIZE, CONFIDENCE, SIZE * 0.9]))
    inside = [image[TOP + SIDE - 40, LEFT + round(x / 10 * SIDE)] for x in (0.5, 9.5)]
    assert tuple(inside[1]) == BAR and inside[0].sum() > inside[1].sum()
