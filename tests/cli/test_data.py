"""`lit-rlhf data`: every row that is read is accounted for, and no weight is."""

import gzip
import json
from pathlib import Path

import pytest

from lit_rlhf.algorithms.reward_model import RewardModel
from lit_rlhf.demo import CONFIGS
from tests.cli.command_line import run

DATA = Path(__file__).parents[3] / "shared" / "data"

pytestmark = pytest.mark.filterwarnings("ignore")
HELLO = [{"role": "user", "content": "Hello."}]
BYE = {"role": "assistant", "content": "Good day!"}
NO = {"role": "assistant", "content": "No."}
ROWS = {
    "sft": [{"messages": [*HELLO, BYE]}, {"messages": [*HELLO, {**BYE, "content": "Good day! " * 30}]}],
    "reward_model": [
        {"prompt": HELLO, "chosen": [BYE], "rejected": [NO]},
        {"prompt": HELLO, "chosen": [NO], "rejected": [NO]},
    ],
    "kto": [
        {"prompt": HELLO, "completion": [BYE], "label": True},
        {"prompt": [BYE | {"role": "user"}], "completion": [NO], "label": False},
    ],
    "process_reward_model": [{"prompt": HELLO, "completions": ["1", "2"], "labels": [True, None]}],
    "ppo": [{"prompt": HELLO, "answer": "3"}],
}


@pytest.fixture
def look(tmp_path, monkeypatch, capsys):
    """Run the command on rows of one config's kind; its exit status, what it said, and its JSON if it wrote one."""
    monkeypatch.chdir(tmp_path)

    def looking(name, *options, rows=None):
        lines = "".join(json.dumps(row) + "\n" for row in rows or ROWS[name])
        (tmp_path / "rows.jsonl").write_text(lines)
        given = ["--model.policy=demo", "--data.train=rows.jsonl", "--data.validation=null", "--json=found.json"]
        status = run("data", "--config", CONFIGS / f"{name}.yaml", *given, *options)
        file = tmp_path / "found.json"
        return status, capsys.readouterr(), json.loads(file.read_text()) if file.exists() else None

    return looking


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_each_kind_of_data_are_shown_without_a_weight(name, look):
    # The demo has config and tokenizer alone, and of PPO's reward model and critic there is nothing.
    status, said, found = look(name, "--data.max_length=40") if name != "ppo" else look(name)
    assert status == 0, said.err
    (source,) = found["roles"]["train"]["sources"]
    assert source["read"] == len(ROWS[name]) == source["whole"] + source["cut"] + sum(source["dropped"].values())
    assert len(found["roles"]["train"]["rows"]) == len(ROWS[name])
    assert all(len(line) <= 80 for line in said.out.splitlines()) and "\x1b" not in said.out
    assert f"rows.jsonl: {source['read']} rows read = {source['whole']} whole + {source['cut']} cut" in said.out


def test_the_page_holds_each_token_with_id_role_and_loss(look, tmp_path):
    status, _, found = look("sft", "--html=rows.html", "--data.max_length=40")
    page = (tmp_path / "rows.html").read_text()
    assert status == 0
    for row in found["roles"]["train"]["rows"]:
        for token in row["parts"][0]["tokens"]:
            assert set(token) == {"id", "text", "role", "learnt", "control"}
            assert json.dumps(token).replace("<", "\\u003c") in page


def test_a_reward_model_is_shown_where_its_scores_are_read(look):
    _, _, found = look("reward_model")
    kept = next(row for row in found["roles"]["train"]["rows"] if row["status"] == "kept")
    assert [sum(token["learnt"] for token in part["tokens"]) for part in kept["parts"]] == [0, 1, 1]
    assert found["model"] == RewardModel.__name__ and found["roles"]["train"]["learnt"] == 2


def test_held_out_rows_are_looked_at_too_and_what_leaks_is_counted(look):
    status, said, found = look("sft", "--data.validation=rows.jsonl", "--show=0")
    assert status == 0 and found["roles"]["validation"]["in_train"] == len(ROWS["sft"])
    assert "leaks: 2 rows are in the training data, too; 2 have a prompt that is" in said.out
    assert not found["roles"]["train"]["rows"] and "as the model sees them" not in said.out


@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_a_share_of_the_training_rows_is_held_out_and_leaks_nothing(name, look):
    sides = {"dpo": {"chosen": " b", "rejected": " c"}, "ppo": {}}[name]
    rows = [{"prompt": f"a{number}", **sides} for number in range(40)]
    status, said, found = look(name, "--data.validation=0.3", "--show=0", rows=rows)
    assert status == 0, said.err
    train, held_out = (found["roles"][role]["sources"][0]["read"] for role in ("train", "validation"))
    assert train + held_out == 40 and 4 <= held_out <= 20
    assert found["roles"]["validation"]["prompts_in_train"] == 0
    assert look(name, "--data.validation=3", rows=rows)[0] == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--show=-1"], "--show (-1) must be 0 or more"),
        (["--html=rows.txt"], "must end in .html"),
        (["--json=rows.jsonl"], "must end in .json"),
        (["--model.policy=nowhere/at/all"], "no model could be loaded there"),
        (["--data=lit_rlhf.PreferenceDataModule"], "SFT learns from a SFTDataModule, not from a PreferenceDataModule"),
        (["--data=lightning.pytorch.demos.boring_classes.BoringDataModule"], "is a class of your own"),
        (["--data.trained_on=rows.jsonl"], "there is no option"),
    ],
)
def test_what_means_nothing_is_refused_in_a_line(options, told, look):
    status, said, _ = look("sft", *options)
    assert status == 2 and told in said.err
    assert len([line for line in said.err.splitlines() if line.startswith("error:")]) == 1


def test_a_row_that_cannot_be_read_is_named_by_file_and_line(look):
    status, said, _ = look("sft", rows=[*ROWS["sft"], {"messages": "Hello"}])
    assert status == 2 and "rows.jsonl, line 3" in said.err


def test_the_commands_of_the_page_on_data_run(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    commands = [line.split()[1:] for line in page.splitlines() if line.startswith("lit-rlhf data ")]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(CONFIGS)
    assert len(commands) == 2
    for command in commands:
        assert run(*command) == 0, capsys.readouterr().err
    assert (tmp_path / "runs" / "rows.html").exists() and (tmp_path / "runs" / "rows.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_rows_of_each_config_are_shown(config, tmp_path, monkeypatch, capsys):
    config = config.absolute()
    monkeypatch.chdir(tmp_path)
    assert run("data", "--config", config, "--model.policy=demo") == 0, capsys.readouterr().err
    assert "validation" in capsys.readouterr().out


FILES = sorted(DATA.rglob("*.jsonl.gz"))
CONFIG_OF = {  # by the columns of a file, the first that fit
    "process_reward_model": {"completions", "labels"},
    "kto": {"completion", "label"},
    "dpo": {"chosen", "rejected"},
    "sft": {"completion"},
    "ppo": {"prompt"},
}


@pytest.mark.slow
@pytest.mark.skipif(not FILES, reason=f"the real rows are not in {DATA}")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name.partition(".")[0])
def test_of_real_rows_none_goes_unreported(file, tmp_path, monkeypatch, capsys):
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        columns, count = set(json.loads(next(lines))), 1 + sum(1 for _ in lines)
    config = next((name for name, needed in CONFIG_OF.items() if needed <= columns), "sft")  # sft: messages
    template = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    (tmp_path / "chat.jinja").write_text(template + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
    path, found = CONFIGS / f"{config}.yaml", tmp_path / "found.json"
    monkeypatch.chdir(tmp_path)
    limit = "max_prompt_length" if config == "ppo" else "max_length"
    given = [f"--model.policy={DATA / 'models' / 'stories260K'}", f"--data.train={file}", "--data.validation=null"]
    shown = 10**6 if count < 500 else 2
    options = [f"--data.{limit}=400", "--data.chat_template=chat.jinja", f"--show={shown}", f"--json={found}"]
    assert run("data", "--config", path, *given, *options) == 0, capsys.readouterr().err
    of = json.loads(found.read_text())["roles"]["train"]
    (source,) = of["sources"]
    assert source["read"] == count == source["whole"] + source["cut"] + sum(source["dropped"].values())
    assert of["examples"] == source["whole"] + source["cut"]
    if shown > count:
        assert len(of["rows"]) == count
        assert sum(len(part["tokens"]) for row in of["rows"] for part in row["parts"]) == of["tokens"]
        assert sum(t["learnt"] for row in of["rows"] for part in row["parts"] for t in part["tokens"]) == of["learnt"]
    reasons = {row["status"] for row in of["rows"]}
    assert set(source["dropped"]) <= reasons and ("truncated" in reasons) == (source["cut"] > 0)
