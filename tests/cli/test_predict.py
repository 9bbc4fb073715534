"""The command `predict`, from a file of prompts to a file of answers."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.cli.command_line import QUICK, predictions, run

EXACT = ["--trainer.precision=32-true"]  # where the processor would multiply in bfloat16


@pytest.mark.filterwarnings("ignore")
def test_predict_writes_completions_as_json_lines_in_the_order_of_the_prompts(workdir, monkeypatch):
    config = Path("configs/dpo.yaml").absolute()
    monkeypatch.chdir(workdir)
    prompts = [{"id": i, "prompt": f"Hello number {i}"} for i in range(5)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    options = ["--data.predict=prompts.jsonl", "--trainer.default_root_dir=out/predict"]
    assert run("predict", "--config", config, *QUICK, *options, "--model.generation.max_new_tokens=4") == 0
    assert [file.name for file in Path("out/predict").iterdir()] == ["predictions.jsonl"]  # no empty curves
    rows = predictions("out/predict")
    assert [{"id": row["id"], "prompt": row["prompt"]} for row in rows] == prompts
    assert all(row["finish_reason"] in ("stop", "length") for row in rows)


@pytest.mark.filterwarnings("ignore")
def test_predict_scores_with_the_head_that_a_reward_model_was_trained_with(workdir, monkeypatch):
    config = Path("configs/reward_model.yaml").absolute()
    monkeypatch.chdir(workdir)
    Path("scored.jsonl").write_text('{"prompt": "Say hello.", "completion": " Hello!", "id": 7}\n')
    options = ["--model.policy=runs/reward_model/model", "--data.predict=scored.jsonl"]
    assert run("predict", "--config", config, *QUICK, *EXACT, *options, "--trainer.default_root_dir=out/scores") == 0

    model = AutoModelForSequenceClassification.from_pretrained("runs/reward_model/model")
    tokenizer = AutoTokenizer.from_pretrained("runs/reward_model/model")
    ids = tokenizer("Say hello. Hello!", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(torch.cat([ids, torch.tensor([[tokenizer.eos_token_id]])], dim=1)).logits.item()
    [row] = predictions("out/scores")
    assert row["score"] == pytest.approx(expected, rel=1e-3) and row["id"] == 7


@pytest.mark.filterwarnings("ignore")
def test_a_head_just_drawn_predicts_nothing(workdir, monkeypatch, capsys):
    config = Path("configs/reward_model.yaml").absolute()
    monkeypatch.chdir(workdir)
    Path("scored.jsonl").write_text('{"prompt": "Say hello.", "completion": " Hello!"}\n')
    options = ["--data.predict=scored.jsonl", "--trainer.default_root_dir=out/drawn"]
    assert run("predict", "--config", config, *QUICK, *options) == 2
    assert "holds no trained reward head, so its scores would be random" in capsys.readouterr().err
    drawn_anew = ["--model.policy=runs/reward_model/model", "--model.fresh_head=true"]
    assert run("predict", "--config", config, *QUICK, *options, *drawn_anew) == 2
    assert "error: fresh_head is true, so its scores would be random" in capsys.readouterr().err
    assert not Path("out/drawn/predictions.jsonl").exists()


@pytest.mark.filterwarnings("ignore")
def test_what_dropped_prompts_were_is_said_and_the_answers_keep_their_ids(workdir, monkeypatch):
    config = Path("configs/dpo.yaml").absolute()
    monkeypatch.chdir(workdir)
    said = []
    monkeypatch.setattr("lit_rlhf.data.report.rank_zero_warn", said.append)
    Path("gaps.jsonl").write_text("".join(json.dumps({"id": i, "prompt": "Hello" * (i != 1)}) + "\n" for i in range(3)))
    options = ["--data.predict=gaps.jsonl", "--trainer.default_root_dir=out/gaps"]
    assert run("predict", "--config", config, *QUICK, *options, "--model.generation.max_new_tokens=2") == 0
    [line] = said
    assert line.startswith(
        "predict prompts gaps.jsonl: 3 rows, 2 used, 1 dropped (1 no whole token as prompt): rows [2]: 1 of 3"
    )
    assert [row["id"] for row in predictions("out/gaps")] == [0, 2]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("completion", ["null", "5", '[{"role": "assistant", "content": "x"}]'])
def test_a_completion_that_cannot_be_scored_is_named_with_its_line(completion, workdir, monkeypatch, capsys):
    config = Path("configs/reward_model.yaml").absolute()
    monkeypatch.chdir(workdir)
    good, bad = '{"prompt": "a", "completion": "b"}', f'{{"prompt": "a", "completion": {completion}}}'
    Path("unscored.jsonl").write_text(f"{good}\n{bad}\n")
    options = ["--model.policy=runs/reward_model/model", "--data.predict=unscored.jsonl"]
    assert run("predict", "--config", config, *QUICK, *options, "--trainer.default_root_dir=out/unscored") == 2
    assert "unscored.jsonl, line 2" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_random_weights_predict_nothing(workdir, monkeypatch, capsys):
    config = Path("configs/sft.yaml").absolute()
    monkeypatch.chdir(workdir)
    options = ["--data.predict=demo", "--trainer.default_root_dir=out/random"]
    assert run("predict", "--config", config, *QUICK, *options) == 2
    assert "from_scratch is true, so the weights are random" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_columns_that_predict_would_overwrite_are_refused_and_known_completions_kept(workdir, monkeypatch, capsys):
    config = Path("configs/dpo.yaml").absolute()
    monkeypatch.chdir(workdir)
    options = ["--data.predict=columns.jsonl", "--trainer.default_root_dir=out/columns"]
    options.append("--model.generation.max_new_tokens=2")
    Path("columns.jsonl").write_text('{"prompt": "Hello", "completion": " you", "id": 3}\n')
    assert run("predict", "--config", config, *QUICK, *options) == 0
    [row] = predictions("out/columns")
    assert set(row) == {"prompt", "completion", "finish_reason", "reference_completion", "id"}
    assert row["reference_completion"] == " you"
    Path("columns.jsonl").write_text('{"prompt": "Hello", "finish_reason": "x"}\n')
    assert run("predict", "--config", config, *QUICK, *options) == 2
    assert "predict writes ['finish_reason']" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_a_reward_model_scores_the_rows_that_predict_writes(workdir, monkeypatch):
    dpo, reward_model = (Path(f"configs/{name}.yaml").absolute() for name in ("dpo", "reward_model"))
    monkeypatch.chdir(workdir)
    ask = [{"role": "user", "content": "Say hello."}]
    rows = [{"prompt": ask}, {"prompt": [*ask, {"role": "assistant", "content": "Hello"}]}, {"prompt": "Say hello."}]
    Path("chat.jsonl").write_text("".join(json.dumps({**row, "id": i}) + "\n" for i, row in enumerate(rows)))
    options = ["--data.predict=chat.jsonl", "--trainer.default_root_dir=out/chat"]
    assert run("predict", "--config", dpo, *QUICK, *options, "--model.generation.max_new_tokens=4") == 0
    written = predictions("out/chat")
    assert [row["prompt"] for row in written] == [row["prompt"] for row in rows]

    options = ["--data.predict=out/chat/predictions.jsonl", "--model.policy=runs/reward_model/model"]
    assert (
        run("predict", "--config", reward_model, *QUICK, *EXACT, *options, "--trainer.default_root_dir=out/judged") == 0
    )
    judged = predictions("out/judged")
    assert [{**row, "score": None} for row in judged] == [{**row, "score": None} for row in written]

    model = AutoModelForSequenceClassification.from_pretrained("runs/reward_model/model")
    tokenizer = AutoTokenizer.from_pretrained("runs/reward_model/model")
    answers = [written[0]["completion"], "Hello" + written[1]["completion"]]
    for row, answer in zip(judged, answers, strict=False):
        whole = [*ask, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(whole, return_tensors="pt", return_dict=False)
        last = int((ids[0] == tokenizer.eos_token_id).nonzero()[-1])
        with torch.no_grad():
            expected = model(ids[:, : last + 1]).logits.item()
        assert row["score"] == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_rows_of_the_demo_are_predicted_only_where_they_are_asked_for(name, workdir, monkeypatch, capsys):
    config = Path(f"configs/{name}.yaml").absolute()
    monkeypatch.chdir(workdir)
    options = [*QUICK, f"--trainer.default_root_dir=out/{name}_demo", "--trainer.limit_predict_batches=1"]
    tokens = "--model.generation.max_new_tokens=2" if name == "dpo" else "--data.max_new_tokens=2"
    assert run("predict", "--config", config, *options, tokens) == 2
    assert "name your prompts by data.predict" in capsys.readouterr().err
    assert not Path(f"out/{name}_demo/predictions.jsonl").exists()
    assert run("predict", "--config", config, *options, tokens, "--data.predict=demo") == 0
    assert predictions(f"out/{name}_demo")


def brief(prompts, responses, id):
    assert id == sorted(id)
    return [-float(len(response)) for response in responses]


@pytest.mark.filterwarnings("ignore")
def test_the_best_of_several_completions_is_written_by_a_function_or_a_reward_model(workdir, monkeypatch, caplog):
    config = Path("configs/dpo.yaml").absolute()
    monkeypatch.chdir(workdir)
    Path("several.jsonl").write_text("".join(json.dumps({"id": i, "prompt": "Hello"}) + "\n" for i in range(3)))
    options = ["--data.predict=several.jsonl", "--trainer.default_root_dir=out/several", "--predictions.group_size=4"]
    options.append("--model.generation.max_new_tokens=4")
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        assert run("predict", "--config", config, *QUICK, *options, f"--predictions.reward={__name__}.brief") == 0
    assert "wrote 3 rows" in caplog.text and "best of 4, of a mean score" in caplog.text
    best = predictions("out/several")
    assert [row["id"] for row in best] == [0, 1, 2]
    assert all(row["score"] == max(row["scores"]) == -len(row["completion"]) for row in best)
    model = ["--predictions.reward=runs/reward_model/model", "--predictions.keep=all"]
    assert run("predict", "--config", config, *QUICK, *options, *model) == 0
    every = predictions("out/several")
    assert [row["id"] for row in every] == [0] * 4 + [1] * 4 + [2] * 4 and all("score" in row for row in every)
    assert {row["completion"] for row in best} <= {row["completion"] for row in every}
