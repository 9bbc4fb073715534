import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from token_tasks import task

from token_mdp import PromptQueue, TokenEnv


def test_prompts_longer_than_p_are_cut_on_the_left_and_info_says_so():
    env = TokenEnv(**task(max_prompt_length=2))
    observation, info = env.reset(options={"prompt_index": 2})  # prompt 4 5 6
    np.testing.assert_array_equal(observation["input_ids"][:2], [5, 6])
    assert (info["prompt_length"], info["prompt_tokens_cut"]) == (2, 1)
    assert env.reset(options={"prompt_index": 1})[1]["prompt_tokens_cut"] == 0


def test_each_prompt_comes_exactly_once_per_pass_in_a_new_order_each_time():
    env = TokenEnv(**task(prompts=[[i] for i in range(6)]))
    first = env.reset(seed=3)[1]["prompt_index"]
    orders = [int(first)] + [int(env.reset()[1]["prompt_index"]) for _ in range(17)]
    passes = [orders[:6], orders[6:12], orders[12:]]
    assert [sorted(order) for order in passes] == [list(range(6))] * 3
    assert passes[0] != passes[1] or passes[1] != passes[2]


def test_unshuffled_prompts_come_in_order():
    env = TokenEnv(**task(shuffle=False))
    assert [int(env.reset()[1]["prompt_index"]) for _ in range(4)] == [0, 1, 2, 0]


def test_picking_a_prompt_leaves_the_queue_as_it_is():
    env = TokenEnv(**task(shuffle=False))
    assert [
        int(env.reset(options=options)[1]["prompt_index"])
        for options in (None, {"prompt_index": 0}, {"prompt_index": None}, {})
    ] == [0, 0, 1, 2]


def test_a_shuffling_queue_and_no_shuffling_contradict_each_other():
    with pytest.raises(ValueError, match=r"shuffle \(False\) contradicts prompt_queue"):
        TokenEnv(**task(prompt_queue=PromptQueue(3), shuffle=False))
    env = TokenEnv(**task(prompt_queue=PromptQueue(3, shuffle=False)))
    assert [env.reset()[1]["prompt_index"] for _ in range(3)] == [0, 1, 2]


def test_the_first_env_with_a_seed_shuffles_a_shared_queue_and_the_seeds_of_others_leave_the_pass_alone():
    queue = PromptQueue(3)
    first, second = (TokenEnv(**task(prompt_queue=queue)) for _ in range(2))

    def dealt(*resets):
        return [int(env.reset(seed=seed)[1]["prompt_index"]) for env, seed in resets]

    second.reset()  # without a seed it lends the queue its generator until one comes with a seed
    alone = TokenEnv(**task())
    expected = dealt((alone, 1), (alone, None), (alone, None))
    assert dealt((first, 1), (second, 2), (second, 3)) == dealt((first, 1), (second, None), (first, None)) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), r"num_prompts \(0\) must be an integer"),
        (("3",), r"num_prompts \('3'\) must be an integer"),
        ((3, "no"), r"shuffle \('no'\) must be True or False"),
        ((3, True, 0), r"group_size \(0\) must be an integer"),
    ],
)
def test_a_queue_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PromptQueue(*arguments)


def test_a_queue_deals_each_prompt_of_a_pass_to_a_whole_group_and_goes_on_from_its_state():
    queue = PromptQueue(3, group_size=2)
    queue.restart(np.random.default_rng(0))
    passes = [[queue.draw() for _ in range(6)] for _ in range(2)]
    assert all(sorted(dealt) == [0, 0, 1, 1, 2, 2] and dealt[::2] == dealt[1::2] for dealt in passes)
    one = PromptQueue(3)
    one.restart(np.random.default_rng(0))
    assert [[one.draw() for _ in range(3)] for _ in range(2)] == [dealt[::2] for dealt in passes]
    first = queue.draw()
    restored = PromptQueue(3, group_size=2)
    restored.load_state_dict(queue.state_dict(), np.random.default_rng(1))
    assert restored.draw() == first
    restored.next_group()
    later = restored.draw()
    assert later != first and restored.draw() == later
    restored.next_group()  # a full group leaves nothing to skip
    assert restored.draw() not in (first, later)


def test_a_queue_deals_only_once_it_has_a_random_generator():
    with pytest.raises(ResetNeeded, match="before restart"):
        PromptQueue(3).draw()
    with pytest.raises(ValueError, match=r"prompt_queue \(3\) must be None or a PromptQueue"):
        TokenEnv(**task(prompt_queue=3))


def test_prompts_may_be_lists_or_integer_arrays_and_one_stop_token_may_be_an_int():
    env = TokenEnv(**task(prompts=[np.array([1], dtype=np.int32), (2, 3)], stop_token_ids=7))
    observation, _ = env.reset(options={"prompt_index": 1})
    assert observation["input_ids"].dtype == np.int64
    assert env.step(7)[2]
