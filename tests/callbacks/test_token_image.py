"""Tokens as a picture: coloured where they stand, by how far their readings are from 0."""

import numpy as np
import pytest

from lit_rlhf.callbacks.token_image import ABOVE, BELOW, WIDTH, colour, reach, token_image


def sample(pieces, readings, prompt="Hi"):
    return {"row": {"prompt": prompt}, "pieces": pieces, "readings": {"KL": readings}}


def shown(image, of):
    return (image == np.array(of, dtype=np.uint8)).all(-1).any()


def test_tokens_below_0_are_blue_and_those_above_red():
    image = token_image([sample([" one", " two", " six"], [1.0, -1.0, 0.0])])
    assert image.shape[1:] == (WIDTH, 3) and image.dtype == np.uint8
    assert shown(image, colour(1.0)) and shown(image, colour(-1.0))
    assert not shown(token_image([sample([" one"], [1.0])]), colour(-1.0))


def test_colours_go_from_white_to_three_quarters_of_the_end_and_no_further():
    assert colour(0.0) == colour(float("nan")) == (255, 255, 255)
    assert colour(1.0) == colour(7.0) == tuple(round(255 + 0.75 * (part - 255)) for part in ABOVE)
    assert colour(-1.0) == tuple(round(255 + 0.75 * (part - 255)) for part in BELOW)


def test_a_few_outliers_do_not_bleach_the_rest():
    assert reach([*[1.0] * 99, 1000.0]) < 20
    assert reach([0.0, 0.0]) == reach([]) == reach([float("nan")]) == 1.0


@pytest.mark.parametrize("text", ["你好 🙂 Grüße", "a\nb\tc", "<script>", "", "x" * 400])
def test_any_text_is_drawn_and_long_ones_break_lines(text):
    short, long = token_image([sample([text], [0.1])]), token_image([sample([f"{text} word"] * 60, [0.1] * 60)])
    assert long.shape[0] > short.shape[0]


def test_it_does_not_grow_with_what_it_is_given():
    few, many = ([sample([" word"] * 500, [0.5] * 500, "word " * 999)] * count for count in (4, 40))
    assert token_image(few).shape == token_image(many).shape
