import asyncio
import copy
import pickle

import numpy as np
import pytest
from token_tasks import END, ends_of_all_slots, task

from token_mdp import RewardError, Shared, TokenEnv, TokenVectorEnv


def lengths(prompts, responses):
    return [float(len(response)) for response in responses]


def prompt_lengths(prompts, responses):
    return np.array([len(prompt) for prompt in prompts])


def raising(prompts, responses):
    raise KeyError("answer")


@pytest.mark.parametrize(
    ("reward_fn", "message"),
    [
        (lambda p, r: None, r"got None \(prompt indices \[0, 1, 2\]\)"),
        (lambda p, r: 1.0, r"shape \(3,\), got shape \(\)"),
        (lambda p, r: np.ones((3, 1)), r"shape \(3,\), got shape \(3, 1\)"),
        (lambda p, r: [1.0, 2.0], r"shape \(3,\), got shape \(2,\)"),
        (lambda p, r: ["good", "bad", "ugly"], r"got \['good', 'bad', 'ugly'\]"),
        (lambda p, r: ["1.5", "2", "3"], r"got \['1.5', '2', '3'\]"),
        (lambda p, r: [1.0, float("nan"), 2.0], r"1 values that are not finite, by prompt index: \{1: nan\}"),
        (lambda p, r: 1 / 0, "reward_fn raised ZeroDivisionError: division by zero"),
        (
            lambda p, r: int("first\nsecond"),
            r"raised ValueError: invalid literal for int\(\) with base 10: 'first\\nsecond'",
        ),
        (lambda p, r: [1.0, None, 2.0], r"one number per response, shape \(3,\), got \[1.0, None, 2.0\]"),
        (lambda p, r: [10**400, 1, 2], r"one number per response, shape \(3,\), got \[1000"),
        (lambda p, r: [float("-inf"), 1.0, 2.0], r"not finite, by prompt index: \{0: -inf\}"),
        (raising, r"reward_fn raised KeyError: 'answer' \(prompt indices \[0, 1, 2\]\)"),
        (lambda p: [1.0], r"reward_fn raised TypeError.*prompt indices \[0, 1, 2\]"),
        ({"style": raising}, r"reward_fn\['style'\] raised KeyError"),
        ({"huge": (lambda p, r: [1e308, 1.0, 1.0], 10.0)}, r"weighted sum of reward_fn has 1 values .*: \{0: inf\}"),
    ],
)
def test_a_bad_reward_names_the_function_the_fault_and_the_prompts(reward_fn, message):
    with pytest.raises(RewardError, match=message):
        ends_of_all_slots(reward_fn=reward_fn)


class Panic(BaseException):
    """As code in Rust raises it."""


@pytest.mark.parametrize("error", [SystemExit, asyncio.CancelledError, GeneratorExit, Panic])
def test_a_reward_that_leaves_the_program_is_an_error_and_the_program_goes_on(error):
    def leaving(prompts, responses):
        raise error(0)

    said = rf"raised {error.__name__}: 0 \(prompt indices \[0, 1, 2\]\)"
    for reward_fn in (leaving, {"style": leaving}):
        with pytest.raises(RewardError, match=rf"reward_fn.* {said}"):
            ends_of_all_slots(reward_fn=reward_fn)
    with pytest.raises(ValueError, match=rf"action_mask {said}"):
        ends_of_all_slots(action_mask=leaving)


@pytest.mark.parametrize("function", ["reward_fn", "action_mask"])
def test_ctrl_c_in_a_reward_is_no_error_of_the_reward(function):
    def interrupted(prompts, responses):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ends_of_all_slots(**{function: interrupted})


@pytest.mark.parametrize("abstain", [False, True])
def test_an_error_knows_the_function_what_it_did_and_the_prompts_at_fault(abstain):
    nan = float("nan")
    for function, problem, indices in (
        (raising, "raised KeyError: 'answer'", [0, 1, 2]),
        (lambda p, r: ["x"] * 3, "must return one number per response, shape (3,), got ['x', 'x', 'x']", [0, 1, 2]),
        (lambda p, r: [nan, 1.0, float("inf")], "returned values that are not finite: nan, inf", [0, 2]),
    ):
        with pytest.raises(RewardError) as error:
            ends_of_all_slots(reward_fn={"style": function}, abstain=abstain)
        for told in (error.value, pickle.loads(pickle.dumps(error.value))):  # as a worker process hands it over
            assert (told.role, told.problem, told.prompt_indices) == ("reward_fn['style']", problem, indices)


def test_a_function_that_abstains_adds_nothing_and_is_nan_in_info():
    reward_fn = {"some": (lambda p, r: [None, 2.0, None], 3.0), "none": lambda p, r: [None] * 3, "all": lengths}
    *_, infos = transition = ends_of_all_slots(reward_fn=reward_fn, abstain=True)
    np.testing.assert_array_equal(transition[1], [1.0, 7.0, 1.0])  # 3·2 + 1 in the middle
    np.testing.assert_array_equal(infos["final_info"]["reward/some"], [np.nan, 2.0, np.nan])
    assert np.isnan(infos["final_info"]["reward/none"]).all()
    np.testing.assert_array_equal(ends_of_all_slots(reward_fn=lambda p, r: [None, 5, None], abstain=True)[1], [0, 5, 0])
    with pytest.raises(RewardError, match=r"\[None, 2.0, None\]; None.* is taken with abstain=True"):
        ends_of_all_slots(reward_fn=reward_fn)


def test_step_rewards_and_potentials_do_not_abstain():
    for name in ("process_reward_fn", "potential_fn"):
        with pytest.raises(RewardError, match=rf"{name} must return one number per response"):
            ends_of_all_slots(**{name: lambda p, r: [None] * len(r)}, abstain=True)


def test_the_single_env_lets_functions_abstain_too():
    env = TokenEnv(**task(reward_fn={"none": lambda p, r: [None], "all": lengths}, abstain=True))
    env.reset()
    _, reward, _, _, info = env.step(END)
    assert reward == 1.0 and np.isnan(info["reward/none"])


@pytest.mark.parametrize(
    ("reward_fn", "message"),
    [
        (lambda p, r: None, r"reward_fn must return .* shape \(1,\), got None \(prompt indices \[2\]\)"),
        (lambda p, r: 1.0, r"shape \(1,\), got shape \(\) \(prompt indices \[2\]\)"),
        (lambda p, r: [[1.0]], r"shape \(1,\), got shape \(1, 1\)"),
        (lambda p, r: ["good"], r"got \['good'\]"),
        (lambda p, r: [float("nan")], r"1 values that are not finite, by prompt index: \{2: nan\}"),
        (raising, r"reward_fn raised KeyError: 'answer' \(prompt indices \[2\]\)"),
        ({"style": raising}, r"reward_fn\['style'\] raised KeyError: 'answer' \(prompt indices \[2\]\)"),
    ],
)
def test_the_single_env_names_the_fault_and_the_prompt_too(reward_fn, message):
    env = TokenEnv(**task(reward_fn=reward_fn))
    env.reset(options={"prompt_index": 2})
    env.step(1)
    with pytest.raises(RewardError, match=message):
        env.step(END)


def test_a_failed_flush_of_many_episodes_names_the_first_of_them():
    env = TokenVectorEnv(num_envs=20, **task(shuffle=False, reward_mode="deferred", reward_fn=raising))
    env.reset()
    env.step(np.full(20, END))
    with pytest.raises(RewardError, match=r"KeyError: 'answer' \(20 prompts, the first \[0, 1, 2, 0, 1\]\)"):
        env.flush_rewards()


def test_a_reward_function_may_use_its_buffer_again():
    buffer = np.zeros(3)

    def reward(prompts, responses):
        buffer[:] += 1
        return buffer

    env = TokenVectorEnv(num_envs=3, **task(reward_fn={"a": reward, "b": (reward, np.float32(0.5))}))
    env.reset()
    *_, infos = env.step(np.full(3, END))
    assert infos["final_info"]["reward/a"].tolist() == [1.0] * 3  # not what the buffer holds by now
    assert infos["final_info"]["reward/b"].tolist() == [2.0] * 3


def test_the_cause_of_a_raising_reward_function_is_kept():
    with pytest.raises(RewardError) as error:
        ends_of_all_slots(reward_fn=raising)
    assert isinstance(error.value.__cause__, KeyError)


class BFloat16OnAGpu:
    """What a torch tensor looks like to the env, which does not know torch."""

    def __init__(self, *done):
        self.done = done

    def detach(self):
        return BFloat16OnAGpu(*self.done, "detach")

    def float(self):
        return BFloat16OnAGpu(*self.done, "float")

    def cpu(self):
        return BFloat16OnAGpu(*self.done, "cpu")

    def numpy(self):
        for needed, error in (("detach", RuntimeError), ("cpu", TypeError), ("float", TypeError)):  # as torch raises
            if needed not in self.done:
                raise error(needed)
        return np.array([0.5, 1.5, 2.5], dtype=np.float32)


@pytest.mark.parametrize("values", [[0.5, 1.5, 2.5], np.array([0.5, 1.5, 2.5], dtype=np.float16), BFloat16OnAGpu()])
def test_rewards_may_be_lists_arrays_or_tensors(values):
    rewards = ends_of_all_slots(reward_fn=lambda p, r: values)[1]
    assert rewards.dtype == np.float64
    np.testing.assert_array_equal(rewards, [0.5, 1.5, 2.5])


def test_components_add_up_by_their_weights_and_each_is_in_info():
    reward_fn = {"lengths": (lengths, 2.0), "prompts": prompt_lengths}
    *_, infos = transition = ends_of_all_slots(reward_fn=reward_fn)
    np.testing.assert_array_equal(transition[1], [3.0, 4.0, 5.0])  # 2·1 + (1, 2, 3)
    np.testing.assert_array_equal(infos["final_info"]["reward/lengths"], [1.0, 1.0, 1.0])
    np.testing.assert_array_equal(infos["final_info"]["reward/prompts"], [1.0, 2.0, 3.0])


def test_a_list_of_components_is_named_after_its_functions():
    *_, infos = transition = ends_of_all_slots(reward_fn=[lengths, (prompt_lengths, 0.5)])
    np.testing.assert_array_equal(transition[1], [1.5, 2.0, 2.5])
    assert {"reward/lengths", "reward/prompt_lengths"} <= infos["final_info"].keys()


@pytest.mark.parametrize(
    ("reward_fn", "message"),
    [
        ([], "at least one component"),
        ({}, "at least one component"),
        ([lengths, lengths], "unique names"),
        ({"process": lengths}, "'process'"),
        ({"a": 3.0}, r"reward_fn\['a'\]"),
        ({"a": Shared(3.0)}, r"reward_fn\['a'\]"),
        (Shared(None), r"got Shared\(None\)"),
        ({"a": (lengths, "much")}, r"reward_fn\['a'\]"),
        ({"a": (lengths, float("nan"))}, r"reward_fn\['a'\]"),
        ((lengths, 0.5), r"is a function and its weight; put the pair into a list"),
        ([lengths, 0.5], r"is a function and its weight; put the pair into a list"),
    ],
)
def test_bad_components_are_refused(reward_fn, message):
    with pytest.raises(ValueError, match=message):
        TokenEnv(**task(reward_fn=reward_fn))


class Model:
    def __init__(self, bias):
        self.bias = bias

    def __call__(self, prompts, responses):
        return [self.bias] * len(responses)

    def __deepcopy__(self, memo):
        raise AssertionError("the model was copied")


def test_copies_of_a_shared_model_are_the_same_model():
    model = Model(2.0)
    shared = Shared(model)
    assert copy.deepcopy({"reward_fn": shared})["reward_fn"].target is model
    assert copy.copy(shared).target is model
    assert shared([], [1, 2]) == [2.0, 2.0] and shared.bias == 2.0
    assert pickle.loads(pickle.dumps(shared)).bias == 2.0
    with pytest.raises(ValueError, match=r"prompts \(Shared\(\[\[1\]\]\)\) must be a sequence"):
        TokenEnv(**task(prompts=Shared([[1]])))  # the handle calls and answers, but is no list


def test_a_shared_model_in_a_list_is_named_after_itself():
    *_, infos = ends_of_all_slots(reward_fn=[Shared(Model(1.0)), Shared(lengths)])
    assert {"reward/Model", "reward/lengths"} <= infos["final_info"].keys()
