"""The gradient table: what is exact, the pattern of what is not, and the page that says so."""

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gradients
from benchmarks.gradient_losses import kl_options, two_prompts, without_scores
from benchmarks.gradient_peers import CASES, answers, peer_rows
from benchmarks.gradients import BETA, COLUMNS, fill, judges, kept, kl_rows, main, method_rows, table
from lit_rlhf.errors import UserError
from lit_rlhf.oracle import GradientJudge, random_problem

ROOT = Path(__file__).parents[2]
PAGE, DATA = ROOT / "docs" / "gradients.md", ROOT / "docs" / "data" / "gradients.jsonl"
PROBLEM = two_prompts()


@pytest.fixture(scope="module")
def rows():
    """Of the KL alone, and of GRPO's divisions in pairs."""
    return [*kl_rows(PROBLEM), *gradients.normalisation_rows(PROBLEM, sizes=(2,))]


@pytest.fixture(scope="module")
def kl(rows):
    """(place, estimator, level, ratio, policy) → row of the KL alone."""
    keys = ("place", "estimator", "level", "ratio", "policy")
    return {tuple(row[key] for key in keys): row for row in rows if row["table"] == "kl"}


@pytest.mark.parametrize("policy", ["on", "off"])
@pytest.mark.parametrize(
    "way",
    [
        ("loss", "k2, k2's gradient", "sequence", "sequence, constant"),
        ("loss", "k1", "sequence", "sequence"),
        ("loss", "k3", "sequence", "sequence"),
        ("loss", "k3", "token", "sequence"),
    ],
)
def test_these_have_the_gradient_of_the_kl_of_whole_responses_on_and_off_policy(kl, way, policy):
    row = kl[(*way, policy)]
    assert (row["cosine"], row["norm_ratio"]) == pytest.approx((1, 1), abs=1e-9)


def test_k1_in_the_reward_has_it_on_policy_alone(kl):
    for ratio in ("none", "token", "geometric mean", "sequence"):
        assert kl["reward", "k1", "token", ratio, "on"]["cosine"] == pytest.approx(1, abs=1e-9)
        assert 0.9 < kl["reward", "k1", "token", ratio, "off"]["cosine"] < 0.999


def test_k2_of_tokens_and_k3_times_the_tokens_ratio_have_one_gradient_that_is_the_tokens_kl(kl):
    of_tokens = kl["loss", "k2", "token", "none", "on"]
    assert of_tokens["cosine"] < 0.99
    for way in (("k3", "token", "token"), ("k1", "token", "token"), ("k3, k2's gradient", "token", "token, constant")):
        assert kl["loss", *way, "on"]["cosine"] == pytest.approx(of_tokens["cosine"], abs=1e-9)
        assert kl["loss", *way, "on"]["norm_ratio"] == pytest.approx(of_tokens["norm_ratio"], abs=1e-9)


def test_k3_as_it_stands_is_worse_and_with_the_ratio_of_responses_of_a_length_another_one_again(kl):
    of_tokens, plain, mean = (
        kl["loss", estimator, "token", ratio, "on"]["cosine"]
        for estimator, ratio in (("k2", "none"), ("k3", "none"), ("k3", "geometric mean"))
    )
    assert plain < mean < of_tokens
    assert kl["loss", "k1", "token", "none", "on"]["norm_ratio"] < 1e-9
    assert math.isnan(kl["loss", "k1", "token", "none", "on"]["cosine"])
    assert kl["reward", "k3", "token", "token", "on"]["cosine"] < 0.5


def test_what_is_exact_here_is_exact_on_another_problem(kl):
    another = without_scores(random_problem(4, 2, seed=5))
    judge = GradientJudge(another, 1.0, another.table_policy().moved(0.7, seed=3))
    for option in kl_options():
        row = kl[option.place, option.estimator, option.level, option.ratio, "on"]
        exact = row["cosine"] > 1 - 1e-9
        assert (judge.measure(option.loss).cosine > 1 - 1e-9) == exact, option


def test_grpo_is_turned_by_each_of_its_divisions_and_rloo_by_none(rows):
    rows = {row["divided"]: row for row in rows if row["table"] == "normalisations"}
    assert rows["neither (RLOO)"]["norm_ratio"] == pytest.approx(1)
    assert rows["neither (Dr. GRPO)"]["norm_ratio"] == pytest.approx(1 / 2)
    assert all(rows[name]["cosine"] == pytest.approx(1) for name in rows if name.startswith("neither"))
    by_one = [rows[f"by the {what}"]["cosine"] for what in ("standard deviation", "length")]
    assert rows["both (GRPO)"]["cosine"] < min(by_one) < max(by_one) < 0.95


def test_beside_whitened_advantages_a_kl_in_the_loss_is_too_light():
    methods = {name: gradients.METHODS[name] for name in ("PPO", "REINFORCE")}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gradients, "METHODS", methods)
        rows = {(row["method"], row["kl"], row["policy"]): row["cosine"] for row in method_rows(PROBLEM)}
    for method in methods:
        assert rows[method, "reward, k1", "on"] == pytest.approx(1)
    assert rows["REINFORCE", "loss, k2_sequence", "on"] == pytest.approx(1)
    assert rows["PPO", "loss, k2_sequence", "on"] < 0.95
    assert rows["PPO, critic untaught", "reward, k1", "on"] < 0.999


def test_dpo_climbs_its_own_objective():
    rows = {(row["pairs"], row["target"]): row for row in gradients.dpo_rows(PROBLEM)}
    for pairs in ("of the policy", "of the reference"):
        own = rows[pairs, "its own objective"]
        assert (own["cosine"], own["norm_ratio"]) == pytest.approx((1, 1))
    assert rows["of the reference", "E[r] - β KL"]["cosine"] < 0.95


def saved():
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    return [row | {key: math.nan for key in ("cosine", "variance") if row[key] is None} for row in rows]


def test_the_page_is_what_the_rows_say_and_the_rows_are_what_is_measured(rows):
    assert fill(PAGE.read_text(), saved()) == PAGE.read_text()
    assert table("kl", rows) == table("kl", saved())
    pairs = [row for row in saved() if row.get("group_size") == 2]
    assert table("normalisations", rows) == table("normalisations", pairs)
    assert {row["library"] for row in saved() if row["table"] == "peers"} == {"lit_rlhf", *CASES}


def test_the_command_writes_lines_and_page_and_keeps_what_peers_gave(rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gradients, "METHODS", {"PPO": gradients.METHODS["PPO"]})
    monkeypatch.setattr(gradients, "NORMALISATIONS", {})
    monkeypatch.setattr(gradients, "kl_rows", lambda problem: (row for row in rows if row["table"] == "kl"))
    page, output = tmp_path / "page.md", tmp_path / "rows.jsonl"
    page.write_text("".join(f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in COLUMNS))
    theirs = {"table": "peers", "library": "trl", "method": "KL alone", "options": "kept", "policy": "on"}
    theirs |= {"cosine": 0.5, "norm_ratio": 2.0, "variance": 3.0}
    output.write_text(json.dumps(theirs) + "\n")
    main(output=str(output), page=str(page), peer_python=None, agilerl_python=None)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all({"method", "kl", "cosine", "norm_ratio", "variance"} <= set(row) for row in printed)
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert written == [*printed, theirs]
    assert "| trl | KL alone | `kept` | 0.500 | 2.00 | 3 |" in page.read_text()
    assert "| loss | k1 | token | none |  | – | 0.00 | – |" in page.read_text()
    assert kept(output, {"trl"}) == [row for row in printed if row["table"] == "peers"]


def test_a_page_that_is_not_there_is_told_before_anything_is_measured(tmp_path):
    with pytest.raises(UserError, match=r"page: there is no .*elsewhere\.md"):
        main(page=str(tmp_path / "elsewhere.md"))


def test_a_python_without_the_library_is_told_in_a_line():
    job = ({}, 1.0, {"logprobs": torch.zeros(1, 3)})
    with pytest.raises(UserError, match=r"agilerl in .* failed: ModuleNotFoundError: No module named 'agilerl'"):
        answers("agilerl", sys.executable, [job])


@pytest.mark.slow
@pytest.mark.skipif("PEER_PYTHON" not in os.environ, reason="PEER_PYTHON names no Python with TRL")
def test_trl_by_tokens_is_ours_and_by_sequences_not_the_gradient_of_the_kl():
    alone, whole = judges(without_scores(PROBLEM), 1.0), judges(PROBLEM, BETA)
    rows = list(peer_rows(alone, whole, {"trl": os.environ["PEER_PYTHON"]}))
    on = {(row["library"], row["options"]): row for row in rows if row["policy"] == "on"}
    ours = on["lit_rlhf", "kl_penalty: {place: loss}"]
    theirs = {key[1]: row for key, row in on.items() if key[0] == "trl" and row["method"] == "KL alone"}
    token = "importance_sampling_level: token, use_bias_correction_kl: True, loss_type: dapo"
    assert theirs[token]["cosine"] == pytest.approx(ours["cosine"])
    assert theirs[token]["norm_ratio"] == pytest.approx(ours["norm_ratio"])
    by_sequence = theirs[token.replace("token,", "sequence,")]
    assert by_sequence["cosine"] < 0.97
    assert by_sequence["norm_ratio"] != pytest.approx(ours["norm_ratio"], rel=0.01)
