"""What the real TensorBoard shows of a run: asked by HTTP, and opened in a browser where one is at hand."""

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lit_rlhf.callbacks import Baseline, Dashboard, Histograms, SampleTable
from tests.stages import make_stage, make_trainer, write_inputs
from website.browser import Browser, asked, chromium, serving, until

TABS = {  # what stands there if the tab has something to show, and the elements that are then drawn
    "timeseries": (("rollout", "val"), ".series-view canvas"),
    "custom_scalars": (("Reward and KL", "Stability", "KL to the reference"), ".render-area path.line"),
    "images": (("samples/tokens", "step 4"), "img[src*=individualImage]"),
    "histograms": (("rollout/advantages_spread",), "path.outline"),
    "text": (("samples/text_summary", "before", "step 4", "score"), "td"),
    "hparams": (("learning_rate", "trainer/max_epochs", "val/score"), "vaadin-grid"),
}
# Words of a table that do not stand in one line.
BROKEN = """elements("td").flatMap(cell => [...cell.childNodes]).filter(node => node.nodeType === 3).flatMap(node =>
  [...node.data.matchAll(/\\S+/g)].filter(word => {
    const range = document.createRange();
    range.setStart(node, word.index);
    range.setEnd(node, word.index + word[0].length);
    return new Set([...range.getClientRects()].map(box => box.top)).size > 1;
  }).map(word => word[0]))"""


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """The logs of a short run of PPO."""
    inputs, folder = tmp_path_factory.mktemp("inputs"), tmp_path_factory.mktemp("logs")
    write_inputs(inputs)
    module, data = make_stage("ppo", inputs)
    logger = TensorBoardLogger(folder, name="", version="ppo", default_hp_metric=False)
    callbacks = [Baseline(), Dashboard(), SampleTable(2), Histograms()]
    options = {"max_epochs": 1, "limit_val_batches": 1.0, "num_sanity_val_steps": -1, "log_every_n_steps": 1}
    make_trainer(folder / "run", logger=logger, callbacks=callbacks, **options).fit(module, data)
    return folder


@pytest.fixture(scope="module")
def address(logs):
    """Where TensorBoard shows them."""
    with serving(logs) as address:
        until(lambda: "rollout/score" in asked(address, "plugin/scalars/tags").get("ppo", ()))  # written last
        yield address


def test_its_plugins_answer_with_what_the_run_has_written(address):
    assert asked(address, "plugin/scalars/scalars", run="ppo", tag="val/score")[0][1] == 0  # the step of the baseline
    pages = asked(address, "plugin/custom_scalars/layout")["category"]
    assert pages[0]["title"] == "Reward and KL"
    curves = asked(address, "plugin/custom_scalars/scalars", run="ppo", tag="[^/]+/score$")["tag_to_events"]
    assert set(curves) == {"rollout/score", "val/score", "over_iterations/score", "over_episodes/score"}
    charts = [tag for page in pages for chart in page["chart"] for tag in chart["multiline"]["tag"]]
    curves = asked(address, "plugin/custom_scalars/scalars", run="ppo", tag=next(t for t in charts if "score" in t))
    assert set(curves["tag_to_events"]) == {"rollout/score", "val/score"}
    assert "samples/text_summary" in asked(address, "plugin/text/tags")["ppo"]
    assert "<table>" in asked(address, "plugin/text/text", run="ppo", tag="samples/text_summary")[-1]["text"]
    assert "samples/tokens" in asked(address, "plugin/images/tags")["ppo"]
    assert "rollout/advantages_spread" in asked(address, "plugin/histograms/tags")["ppo"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One for all tests."""
    if chromium() is None:
        pytest.skip("no Chromium is at hand")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.slow
@pytest.mark.parametrize("tab", TABS)
def test_a_tab_shows_its_part_in_a_browser(tab, address, browser):
    words, drawn = TABS[tab]
    browser.open(f"{address}/#{tab}", *words)
    until(lambda: browser.value(f"elements('{drawn}').length"))


@pytest.mark.slow
def test_the_table_of_settings_has_the_last_results_of_the_run(address, browser):
    last = asked(address, "plugin/scalars/scalars", run="ppo", tag="val/score")[-1][2]
    shown = browser.value(f"({last}).toPrecision(5)")
    browser.open(f"{address}/#hparams", "Trial ID", "ppo", "0.010000", shown)


@pytest.mark.slow
def test_samples_are_readable_in_a_narrow_window(address, browser):
    browser.resize(700, 900)
    browser.open(f"{address}/#text", "before", "step 4")
    assert browser.value("elements('td').length") >= 6
    assert browser.value(BROKEN) == []


@pytest.mark.slow
def test_the_page_of_tokens_draws_them_and_goes_back_in_time(logs, browser):
    browser.open((logs / "run" / "samples.html").as_uri(), "step 4", "advantage")
    assert browser.value("document.querySelectorAll('.token').length") > 4
    browser.value("document.getElementById('when').value = 0; document.getElementById('when').oninput()")
    assert browser.value("document.getElementById('step').textContent") == "before training"
