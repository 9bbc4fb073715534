import json

import pytest

from benchmarks import process_rewards
from benchmarks.process_rewards import main, outcome, right
from lit_rlhf import UserError


def test_a_response_is_right_by_all_of_its_steps_and_its_outcome_by_the_last():
    prompts = ["3 4 5 :"] * 4
    responses = ["3 + 4 = 7 ; 7 + 5 = 12 ;", "3 + 4 = 8 ; 8 + 4 = 12 ;", "3 + 4 = 7 ;", ""]
    assert right(prompts, responses) == [1, 0, 0, 0]
    assert outcome(prompts, responses) == [1, 1, 0, 0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_outcome_is_held_against_process_reward(tmp_path, monkeypatch):
    monkeypatch.setattr(process_rewards, "ROWS", 48)
    monkeypatch.setattr(process_rewards, "HELD_OUT", 8)
    rewards = ("outcome", "outcome, shaped by steps")
    main(str(tmp_path / "lines.jsonl"), rewards, seeds=1, iterations=1, episodes=16, epochs=1)
    rows = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in rows] == list(rewards)
    for row in rows:
        assert row["samples"] == 16 and len(row["curve"]) == 1 and 0 <= row["right"] <= 1


def test_another_reward_is_refused():
    with pytest.raises(UserError, match="rewards"):
        main(rewards=("luck",))
