"""The pictures of docs and README are there, small, used, and taken by a command."""

import re
from pathlib import Path

import pytest
from PIL import Image

from lit_rlhf.callbacks.token_page import token_page
from website.browser import Browser, chromium
from website.screenshots import IMAGES, SHOTS, Shot, take

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PICTURES = [
    (page, link)
    for page in PAGES
    for link in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", page.read_text())
    if "://" not in link
]


@pytest.mark.parametrize(("page", "link"), PICTURES, ids=[f"{page.stem}-{link}" for page, link in PICTURES])
def test_a_picture_of_the_docs_is_there(page, link):
    assert (page.parent / link).is_file()


def test_the_docs_show_every_screenshot_and_no_other():
    shown = {(page.parent / link).resolve() for page, link in PICTURES}
    taken = {IMAGES / f"{name}.png" for name in SHOTS}
    assert set(IMAGES.iterdir()) == {file for file in shown if file.parent == IMAGES} == taken


@pytest.mark.parametrize("name", SHOTS)
def test_a_screenshot_is_of_its_window_and_small(name):
    file = IMAGES / f"{name}.png"
    with Image.open(file) as picture:
        assert picture.size == SHOTS[name].size
    assert file.stat().st_size < 200_000


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="no Chromium is at hand")
def test_a_page_is_taken_once_it_is_drawn(tmp_path):
    sample = {"row": {"prompt": "Hi", "completion": "there"}, "pieces": ["there"], "readings": {"KL": [0.5]}}
    (tmp_path / "samples.html").write_text(token_page([{"step": 3, "samples": [sample]}]))
    browser = Browser(tmp_path / "profile")
    try:
        shot = Shot("", "samples.html", (320, 200), ("step 3",), ".token")
        take(browser, shot, tmp_path, tmp_path / "page.png")
    finally:
        browser.close()
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size == (320, 200) and len(picture.convert("RGB").getcolors(1 << 16)) > 20  # not blank
