import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.error import DependencyNotInstalled, ResetNeeded
from gymnasium.wrappers import RecordVideo, RenderCollection
from token_tasks import make, play, task

from token_mdp import TokenEnv, pictures
from token_mdp.pictures import COLUMNS, ROWS, picture

pytest.importorskip("PIL", reason="needs Pillow")


@pytest.fixture(params=["the system's font", "Pillow's own font"])
def font(request, monkeypatch):
    if request.param == "Pillow's own font":
        monkeypatch.setattr(pictures, "FONTS", ())
    for cached in (pictures._font, pictures._is_drawn):
        cached.cache_clear()
    yield pictures._font()
    for cached in (pictures._font, pictures._is_drawn):
        cached.cache_clear()


def cells(image, font):
    """Which cells (rows, columns) of a picture have ink."""
    _, width, height = font
    ink = (image != image[-1, -1]).any(-1)
    return ink.reshape(ROWS, height, COLUMNS, width).any((1, 3))


def test_each_character_is_drawn_in_its_cell(font):
    drawn = cells(picture("ab  c\n\n d"), font)
    assert np.argwhere(drawn).tolist() == [[0, 0], [0, 1], [0, 4], [2, 1]]


def test_long_lines_go_on_beside_their_label_and_the_last_lines_are_seen(font):
    drawn = cells(picture("response │ " + "x" * (COLUMNS - 11 + 5)), font)
    assert drawn[0, 11:].all() and np.flatnonzero(drawn[1]).tolist() == [9, *range(11, 16)]
    scrolled = cells(picture("\n".join("a" * (row + 1) for row in range(ROWS + 3))), font)
    assert scrolled.sum(1).tolist() == [row + 4 for row in range(ROWS)]


def test_a_character_that_the_font_lacks_is_written_as_its_code(font):
    assert np.array_equal(picture("a\N{HANGUL SYLLABLE GA}\x00\t"), picture(r"a\uac00\x00\t"))


@pytest.mark.parametrize("env_id", ["LitRLHF/Token-v0", "LitRLHF/TokenFlat-v0"])
def test_rgb_array_draws_the_text_of_ansi_at_each_step(env_id):
    drawn, told = (gymnasium.make(env_id, render_mode=mode) for mode in ("rgb_array", "ansi"))
    shapes = set()
    for env in (drawn, told):
        env.reset(seed=0, options={"prompt_index": 6})
    for token in (1, 3, 0):
        play(drawn, token), play(told, token)
        image = drawn.render()
        assert np.array_equal(image, picture(told.render()))
        shapes.add((image.shape, image.dtype.name))
    assert len(shapes) == 1 and all(side % 2 == 0 for side in image.shape[:2])  # as encoders of videos want them


def test_the_vector_env_draws_every_slot():
    env = make(num_envs=2, shuffle=False, render_mode="rgb_array")
    with pytest.raises(ResetNeeded, match="render"):
        env.render()
    env.reset()
    env.step(np.array([5, 6]))
    images = env.render()
    assert np.array_equal(images[1], picture("slot 1\nprompt   │ 2 3\nresponse │ 6\nreward   │ not yet"))
    assert len(images) == 2 and not np.array_equal(images[0], images[1])


def test_wrappers_that_collect_pictures_find_one_per_step():
    env = RenderCollection(gymnasium.make("LitRLHF/Token-v0", render_mode="rgb_array"))
    env.reset(seed=0)
    play(env, 1, 0)
    assert len(env.render()) == 3


def test_record_video_writes_a_video_of_each_episode(tmp_path):
    pytest.importorskip("moviepy", reason="needs MoviePy")
    env = gymnasium.make("LitRLHF/Token-v0", render_mode="rgb_array")
    env = RecordVideo(env, str(tmp_path / "videos"), episode_trigger=lambda episode: True)
    for _ in range(2):
        env.reset(seed=0)
        play(env, 1, 0)
    env.close()
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 2


def test_without_pillow_the_env_is_made_and_render_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    env = TokenEnv(**task(render_mode="rgb_array"))
    env.reset()
    with pytest.raises(DependencyNotInstalled, match=r"'rgb_array' draws with Pillow.*run `pip install pillow`"):
        env.render()
