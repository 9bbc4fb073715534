"""The figures of the docs draw from the data of the benchmarks."""

import json

import pytest

from benchmarks.credit_assignment import METHODS, learn

pytest.importorskip("matplotlib", reason="figures need the extra `figures`")
from benchmarks.figures import DOCS, FIGURES, main


def test_every_data_set_of_the_docs_is_drawn_to_the_same_bytes_twice(tmp_path):
    main(output=str(tmp_path / "first"))
    main(output=str(tmp_path / "second"))
    drawn = {path.stem for path in (tmp_path / "first").iterdir()}
    assert drawn == {path.stem for path in (DOCS / "data").glob("*.jsonl")} & set(FIGURES)
    for name in drawn:
        first, second = (tmp_path / which / f"{name}.png" for which in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


def test_a_missing_data_set_is_named_and_no_figure_is_left(tmp_path, capsys):
    main(data=str(tmp_path), output=str(tmp_path / "figures"))
    said = capsys.readouterr().out
    assert all(f"benchmarks/{name}.py" in said for name in FIGURES)
    assert not list((tmp_path / "figures").iterdir())


def test_the_frontier_marks_each_point_with_its_beta(tmp_path):
    rows = [
        {"algorithm": "sft", "beta": None, "kl": 0.0, "proxy_reward": 0.0, "gold_reward": 0.0},
        {"algorithm": "ppo", "beta": 0.3, "kl": 1.0, "proxy_reward": 1.0, "gold_reward": 0.5},
        {"algorithm": "dpo", "beta": 0.25, "kl": 2.0, "proxy_reward": 0.7, "gold_reward": 0.4},
    ]
    figure = FIGURES["frontier"](rows)
    for axis in figure.axes:
        assert {"SFT", "0.3", "0.25"} <= {text.get_text() for text in axis.texts}


def test_credit_is_assigned_faster_where_rewards_come_with_their_tokens():
    """T = 16: to 90 % of the optimum."""
    samples = {name: learn(16, *how, seed=0)[0] for name, how in METHODS.items()}
    assert samples["process reward, GAE λ = 0.95"] < samples["sparse reward, REINFORCE"]
    assert all(count is not None for count in samples.values()), json.dumps(samples)
