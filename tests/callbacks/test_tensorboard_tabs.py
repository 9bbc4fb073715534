"""What the real TensorBoard shows of a run: asked by HTTP, and opened in a browser where one is at hand."""

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lit_rlhf.callbacks import Baseline, Dashboard, Histograms, SampleTable
from tests.stages import make_stage, make_trainer, write_inputs
from tests.tensorboard_browser import Browser, asked, chromium, serving, until

TABS = {  # and words that are there if the tab has something to show
    "custom_scalars": ("Reward and KL", "Stability", "KL to the reference"),
    "text": ("samples/text_summary", "before", "step 4"),
    "images": ("samples/tokens",),
    "histograms": ("rollout/advantages",),
    "hparams": ("learning_rate", "data/max_tokens", "val/score"),
}


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


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="no Chromium is at hand")
def test_every_tab_shows_its_part_in_a_browser(address, tmp_path):
    browser = Browser(tmp_path)
    try:
        for tab, words in TABS.items():
            browser.open(f"{address}/#{tab}", *words)
    finally:
        browser.close()


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="no Chromium is at hand")
def test_the_page_of_tokens_draws_them_and_goes_back_in_time(logs, tmp_path):
    browser = Browser(tmp_path)
    try:
        browser.open((logs / "run" / "samples.html").as_uri(), "step 4", "advantage")
        assert browser.value("document.querySelectorAll('.token').length") > 4
        browser.value("document.getElementById('when').value = 0; document.getElementById('when').oninput()")
        assert browser.value("document.getElementById('step').textContent") == "before training"
    finally:
        browser.close()
