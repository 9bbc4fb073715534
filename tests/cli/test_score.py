"""Scores for the responses in a file."""

import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lit_rlhf import RewardModel
from lit_rlhf.callbacks.export import export
from tests.cli.command_line import run
from tests.tiny import EOS, tiny_tokenizer

COMPLETIONS = [{"prompt": "w10 w11", "completion": f" w{12 + i}" * (i + 1), "id": i} for i in range(5)]
PAIRS = [
    {"prompt": "w10", "chosen": " w11", "rejected": " w12 w13"},  # margin 1 by `brief`
    {"prompt": "w10", "chosen": " w11 w12 w13", "rejected": " w14"},  # -2
    {"prompt": "w10", "chosen": " w11", "rejected": " w12"},  # a tie
]
QUESTION = [{"role": "user", "content": "w10"}]
TEMPLATE = "{% for m in messages %}{{ 'w7 ' + m.content + ' ' }}{% endfor %}{% if add_generation_prompt %}w7{% endif %}"
heard = []


def brief(prompts, responses, **columns):
    heard.append((prompts, responses, columns))
    return [-float(len(response.split())) for response in responses]


def no_number(prompts, responses):
    return [0.0 if "w12" in response else float("nan") for response in responses]


@pytest.fixture(scope="module")
def reward_model(folder, tmp_path_factory):
    """The folder of a reward model whose scores have a shift beside the head, and whose tokenizer has a template."""
    module = RewardModel(str(folder), fresh_head=True, normalize=None)
    module.tokenizer.chat_template = TEMPLATE
    module.reward_model.model.config.score_bias = 0.5
    target = tmp_path_factory.mktemp("reward_model") / "model"
    export(module, module.exported_weights(), target)
    return target


@pytest.fixture
def score(tmp_path, capsys):
    """Write rows and score them; returns status, rows with scores, what was printed, and the errors."""
    heard.clear()

    def score(rows, *args):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        out = tmp_path / "scored.jsonl"
        status = run("score", *args, f"--data={tmp_path / 'rows.jsonl'}", f"--output={out}")
        lines = out.read_text().splitlines() if out.exists() else []
        return status, [json.loads(line) for line in lines], *capsys.readouterr()

    return score


def own_scores(folder, texts):
    """By transformers, at the end token."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), tiny_tokenizer()
    ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], EOS] for text in texts]
    with torch.no_grad():
        return [model(torch.tensor([one])).logits.item() + 0.5 for one in ids]


def test_a_reward_model_gives_completions_what_transformers_gives_them(reward_model, score):
    _, rows, printed, _ = score(COMPLETIONS, reward_model)
    expected = own_scores(reward_model, [row["prompt"] + row["completion"] for row in COMPLETIONS])
    assert [row.pop("score") for row in rows] == pytest.approx(expected, rel=1e-4)
    assert rows == COMPLETIONS
    error = np.std(expected, ddof=1) / 5**0.5
    mean, its_error, low, high = map(float, re.findall(r"-?\d+\.\d{4}", printed))
    assert "5 rows" in printed
    assert [mean, its_error, low, high] == pytest.approx(
        [np.mean(expected), error, min(expected), max(expected)], abs=1e-3
    )


def test_a_function_is_handed_texts_and_columns_as_they_stand(score):
    _, rows, printed, _ = score(COMPLETIONS, f"--reward={__name__}.brief", "--name=brevity")
    assert [row["brevity"] for row in rows] == [-1, -2, -3, -4, -5]
    assert "5 rows: mean score -3.0000 ± 0.7071, from -5.0000 to -1.0000" in printed  # √(2.5 / 5)
    ((prompts, responses, columns),) = heard
    assert (prompts, responses) == (["w10 w11"] * 5, [row["completion"] for row in COMPLETIONS])
    assert columns["id"] == [0, 1, 2, 3, 4]


def test_pairs_have_both_scores_and_an_accuracy_to_which_a_tie_adds_half(score):
    _, rows, printed, _ = score(PAIRS, f"{__name__}.brief")
    assert [(row["chosen_score"], row["rejected_score"]) for row in rows] == [(-1, -2), (-3, -1), (-1, -1)]
    assert [{name: row[name] for name in PAIRS[0]} for row in rows] == PAIRS
    assert "3 pairs: accuracy 0.5000, mean margin -0.3333" in printed  # (1 + 0 + ½) / 3, (1 - 2 + 0) / 3


def test_a_reward_model_scores_pairs_as_it_scores_completions(reward_model, score):
    _, rows, _, _ = score(PAIRS, reward_model)
    for side in ("chosen", "rejected"):
        expected = own_scores(reward_model, [row["prompt"] + row[side] for row in PAIRS])
        assert [row[f"{side}_score"] for row in rows] == pytest.approx(expected, rel=1e-4)


def test_messages_are_text_by_the_template_of_a_model(reward_model, folder, score):
    rows = [{"prompt": QUESTION, "completion": "w12"}]
    pairs = [{"prompt": QUESTION, "chosen": "w12", "rejected": "w13"}]
    for given, column in ((rows, "completion"), (pairs, "chosen")):
        status, _, _, told = score(given, f"{__name__}.brief")
        assert status == 2 and "line 1, column 'prompt': a function scores text" in told and "--tokenizer" in told
        status, _, _, told = score(given, f"{__name__}.brief", f"--tokenizer={folder}")
        assert status == 2 and "line 1, column 'prompt': this is a message list, and the tokenizer has no chat" in told
        assert score(given, f"{__name__}.brief", f"--tokenizer={reward_model}")[0] == 0
        assert heard[0][0] == ["w7 w10 w7"] and heard[0][1][0].strip() == "w12", column
        heard.clear()


def test_many_rows_are_scored_some_at_a_time_in_their_order(score, monkeypatch):
    monkeypatch.setattr("lit_rlhf.cli.score.PREDICT_BATCH", 2)
    _, rows, _, _ = score(COMPLETIONS, f"{__name__}.brief")
    assert [len(prompts) for prompts, _, _ in heard] == [2, 2, 1]
    assert [row["score"] for row in rows] == [-1, -2, -3, -4, -5]


@pytest.mark.parametrize(
    ("rows", "args", "said"),
    [
        ([{"prompt": "w10"}], ["brief"], "expected the columns `prompt` and `completion`"),
        ([], ["brief"], "there are no rows"),
        ([COMPLETIONS[0], {"prompt": "w10"}], ["brief"], "line 2"),
        ([{**COMPLETIONS[0], "score": 1}], ["brief"], "name: the data have a column 'score' already"),
        (COMPLETIONS[:2], ["no_number"], "not finite: nan .*line 2"),
        (COMPLETIONS, ["brief", "--name="], "name"),
        (COMPLETIONS, ["brief", "--tokenizer=nowhere/there"], "nowhere/there"),
        (COMPLETIONS, ["nothing"], "neither a folder nor the import path"),
    ],
)
def test_what_cannot_be_scored_is_told_in_a_line_and_nothing_is_written(rows, args, said, score):
    name, *options = args
    status, written, _, told = score(rows, f"--reward={__name__}.{name}", *options)
    assert status == 2 and written == []
    (line,) = [line for line in told.splitlines() if line.startswith("error:")]
    assert re.search(said if ".*" in said else re.escape(said), line)


def test_the_file_that_is_read_is_not_replaced(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(COMPLETIONS[0]))
    assert run("score", f"{__name__}.brief", f"--data={file}", f"--output={file}") == 2
    assert "would be replaced" in capsys.readouterr().err
    assert json.loads(file.read_text()) == COMPLETIONS[0]
