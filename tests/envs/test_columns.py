import numpy as np
import pytest
from token_tasks import ends_of_all_slots, task

from token_mdp import RewardError, Shared, TokenVectorEnv


class ByLabel(list):
    """Like a column of pandas whose rows were turned round: an index is a label, iteration goes by position."""

    def __getitem__(self, label):
        return super().__getitem__(len(self) - 1 - label)


def test_columns_go_with_the_prompts_by_position_not_by_label():
    seen = []

    def reward(prompts, responses, name):
        seen.extend(zip([prompt.tolist() for prompt in prompts], name, strict=True))
        return [0.0] * len(responses)

    env = TokenVectorEnv(
        num_envs=3, **task(shuffle=False, reward_fn=reward, columns={"name": ByLabel(["one", "two", "three"])})
    )
    env.reset()
    env.step(np.full(3, 7))
    assert seen == [([1], "one"), ([2, 3], "two"), ([4, 5, 6], "three")]


def test_each_function_gets_the_columns_that_it_names():
    seen = {}

    class Grader:
        def __call__(self, prompts, responses, level):
            seen["a method"] = level
            return [0.0] * len(responses)

    def none(prompts, responses):
        return [1.0] * len(responses)

    def one(prompts, responses, answer, other=None):
        seen["one"] = answer
        return [0.0] * len(responses)

    def every(prompts, responses, **columns):
        seen["every"] = columns
        return np.ones((len(responses), 8), dtype=bool)

    ends_of_all_slots(
        columns={"answer": ["a", "b", "c"], "level": [1, 2, 3]},
        reward_fn={"none": none, "one": one, "grader": Shared(Grader())},
        process_reward_fn=none,
        potential_fn=none,
        action_mask=every,
    )
    assert seen["one"] == ["a", "b", "c"] and seen["a method"] == [1, 2, 3]
    assert seen["every"].keys() == {"answer", "level"}
    with pytest.raises(RewardError, match=r"reward_fn raised TypeError.*'answer'"):  # named, but not there
        ends_of_all_slots(reward_fn=one)


def test_what_a_function_writes_into_its_columns_reaches_no_later_call():
    seen = []

    def greedy(prompts, responses, turns, answer):
        seen.append((turns, answer))
        for values in (turns, answer):
            values[0].clear()
            values.pop()
        return [0.0] * len(responses)

    columns = {"turns": [[{"role": "user", "content": ["a"]}]] * 3, "answer": [{"x": [1]}, {"x": [2]}, {"x": [3]}]}
    env = TokenVectorEnv(num_envs=3, **task(shuffle=False, reward_fn={"a": greedy, "b": greedy}, columns=columns))
    for _ in range(2):
        env.reset(seed=0)
        env.step(np.full(3, 7))
    assert all(len(turns) == 2 for turns, _ in seen)
    assert columns["turns"][0] == [{"role": "user", "content": ["a"]}] and columns["answer"][0] == {"x": [1]}


@pytest.mark.parametrize("name", ["prompts", "responses", "self"])
def test_a_column_that_would_hide_an_argument_is_refused(name):
    with pytest.raises(ValueError, match=rf"columns\['{name}'\] would hide the argument '{name}'"):
        TokenVectorEnv(num_envs=1, **task(columns={name: [1, 2, 3]}))


def test_columns_are_copied_however_deep_they_are_nested():
    def reward(prompts, responses, deep):
        deep[0][0].append("seen")
        return [0.0] * len(responses)

    nested = ["end"]
    for _ in range(5000):
        nested = [nested]
    env = TokenVectorEnv(num_envs=1, **task(reward_fn=reward, columns={"deep": [nested] * 3}))
    env.reset(seed=0)
    env.step([7])
    assert len(nested[0]) == 1
