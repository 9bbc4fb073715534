"""Take the docs' pictures of TensorBoard and of the page of tokens from the runs of `make demo`: `make screenshots`."""

import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from jsonargparse import auto_cli

from website.browser import Browser, chromium, serving, until

IMAGES = Path(__file__).parents[1] / "docs" / "images"
PATIENCE = 120  # seconds for a page to be drawn


class Shot(NamedTuple):
    """A page worth a picture."""

    runs: str  # folder under the root
    tab: str  # of TensorBoard, or the file in the folder that is the page
    size: tuple[int, int]  # of the window, in pixels
    words: tuple[str, ...]  # that stand there once it is drawn
    drawn: str  # CSS selector of what is then there


SHOTS = {
    "custom_scalars": Shot("ppo", "custom_scalars", (1280, 760), ("Reward and KL",), ".render-area path.line"),
    "histograms": Shot("ppo", "histograms", (1280, 760), ("rollout/advantages_spread",), "path.outline"),
    "images": Shot("reward_model", "images", (1000, 960), ("val/calibration",), "img[src*=individualImage]"),
    "text": Shot("dpo", "text", (1000, 700), ("before", "implicit_reward"), "td"),
    "hparams": Shot("", "hparams", (1760, 380), ("ppo/lightning_logs",), "vaadin-grid"),
    "token_page": Shot("ppo", "samples.html", (1000, 620), ("advantage",), ".token"),
}


def screenshots(root: str = "runs/demo", output: str = str(IMAGES)) -> None:
    """Write a PNG for each of `SHOTS`.

    Args:
        root: folder of finished runs of the demo; TensorBoard shows its path.
        output: folder of the pictures.
    """
    if chromium() is None:
        raise SystemExit("no Chromium is at hand; install the package chromium")
    Path(output).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(profile)
        try:
            for name, shot in SHOTS.items():
                take(browser, shot, Path(root) / shot.runs, Path(output) / f"{name}.png")
                print(f"{output}/{name}.png", flush=True)
        finally:
            browser.close()


def take(browser: Browser, shot: Shot, runs: Path, file: Path) -> None:
    """Write the picture of a page."""
    browser.resize(*shot.size)
    if shot.tab.endswith(".html"):
        write_drawn(browser, shot, (runs / shot.tab).resolve().as_uri(), file)
        return
    with serving(runs) as address:
        write_drawn(browser, shot, f"{address}/#{shot.tab}", file)


def write_drawn(browser: Browser, shot: Shot, address: str, file: Path) -> None:
    """Write the picture once the page has what is expected and no longer changes."""
    browser.open(address, *shot.words, seconds=PATIENCE)
    until(lambda: browser.value(f"elements('{shot.drawn}').length"), PATIENCE)
    earlier = b""

    def still() -> bool:
        nonlocal earlier
        before, earlier = earlier, browser.picture(file)
        time.sleep(1)
        return before == earlier

    until(still, PATIENCE)


if __name__ == "__main__":
    auto_cli(screenshots, as_positional=False)
