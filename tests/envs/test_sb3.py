"""The adapter that hands the native vector env to Stable-Baselines3."""

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import RecordEpisodeStatistics as RecordSingle
from gymnasium.wrappers.vector import NormalizeReward, RecordEpisodeStatistics, TransformReward
from token_tasks import END, VOCAB, assert_same, task

from token_mdp import PromptQueue, TokenEnv, TokenVectorEnv

pytest.importorskip("stable_baselines3", reason="needs the extra `agents`")
pytest.importorskip("sb3_contrib", reason="needs the extra `agents`")

from stable_baselines3.common.vec_env import DummyVecEnv

from token_mdp.sb3 import SB3VecEnv


def native(num_envs=4, **arguments):
    return SB3VecEnv(gymnasium.make_vec("LitRLHF/Token-v0", num_envs=num_envs, **arguments))


def single():
    return gymnasium.make("LitRLHF/Token-v0")


@pytest.mark.parametrize("limit", ["terminate", "truncate"])
@pytest.mark.parametrize("observation", ["dict", "flat"])
def test_the_adapter_returns_what_a_dummy_vec_env_of_single_envs_returns(observation, limit):
    arguments = task(
        observation=observation,
        limit=limit,
        action_mask=True,
        process_reward_fn=lambda prompts, responses: [0.5] * len(responses),
    )
    adapter = SB3VecEnv(TokenVectorEnv(num_envs=3, shuffle=False, **arguments))
    queue = PromptQueue(3, shuffle=False)
    dummy = DummyVecEnv([lambda: TokenEnv(prompt_queue=queue, **arguments)] * 3)
    native_only = {"episode_id", "active", "input_ids", "attention_mask", "length"}

    def shared(infos):
        return [{key: value for key, value in info.items() if key not in native_only} for info in infos]

    def plain(observations):
        return {**observations} if observation == "dict" else observations

    assert adapter.observation_space == dummy.observation_space and adapter.action_space == dummy.action_space
    assert_same(plain(adapter.reset()), plain(dummy.reset()))
    assert_same(shared(adapter.reset_infos), dummy.reset_infos)
    rng = np.random.default_rng(0)
    ends = 0
    for _ in range(40):
        actions = rng.integers(VOCAB, size=3)
        observations, rewards, dones, infos = adapter.step(actions)
        expected_observations, *expected, expected_infos = dummy.step(actions)
        assert_same(plain(observations), plain(expected_observations))
        assert_same([rewards, dones], expected)
        assert_same(shared(infos), expected_infos)
        assert_same(shared(adapter.reset_infos), dummy.reset_infos)
        ends += dones.sum()
    assert ends > 10


@pytest.mark.parametrize("num_envs", [3, 4])  # 3 statistics per episode: with 3 slots a mix-up has fitting shapes
def test_the_adapter_keeps_the_statistics_of_an_episode_on_the_step_that_ends_it(num_envs):
    arguments = task(shuffle=False, prompts=[[1], [2], [3], [4]])
    env = SB3VecEnv(RecordEpisodeStatistics(TokenVectorEnv(num_envs=num_envs, **arguments)))
    env.reset()
    env.step(np.ones(num_envs, dtype=int))
    *_, dones, infos = env.step(np.array([1, END, 1, 1][:num_envs]))
    assert dones.tolist() == [False, True, False, False][:num_envs]
    assert [("episode" in info) for info in infos] == dones.tolist()
    assert infos[1]["episode"]["r"] == 200 + 1 + 2 * END and infos[1]["episode"]["l"] == 2
    assert "episode" not in env.reset_infos[1]


def test_the_adapter_takes_wrappers_of_rewards_and_gymnasiums_own_vector_env():
    rewards = [-1.0, 2.0, -3.0]
    arguments = task(shuffle=False, max_new_tokens=1, reward_fn=lambda p, r: [rewards[x[0] - 1] for x in p])
    arguments["prompts"] = [[1], [2], [3]]
    queues = [PromptQueue(3, shuffle=False) for _ in range(2)]
    makers = [lambda: RecordSingle(TokenEnv(prompt_queue=queues[0], **arguments))] * 3
    sync = SB3VecEnv(SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP))
    plain = SB3VecEnv(TransformReward(TokenVectorEnv(num_envs=3, **arguments), np.negative))
    for env, sign in ((sync, 1), (plain, -1)):
        env.reset()
        _, paid, dones, infos = env.step(np.ones(3, dtype=int))
        assert dones.all() and (sign * paid).tolist() == rewards
        assert [info["terminal_observation"]["length"][0] for info in infos] == [2, 2, 2]
        assert [info["prompt_index"] for info in infos] == [0, 1, 2]
    assert [info["episode"]["r"] for info in sync.step(np.ones(3, dtype=int))[3]] == rewards


def test_the_adapter_takes_normalized_rewards():
    vector = NormalizeReward(
        TokenVectorEnv(num_envs=2, **task(max_new_tokens=1, reward_fn=lambda p, r: [4.0] * len(r)))
    )
    env = SB3VecEnv(vector)
    env.reset()
    rewards = env.step(np.ones(2, dtype=int))[1]
    np.testing.assert_allclose(rewards, 4.0 / np.sqrt(vector.return_rms.var + vector.epsilon), rtol=1e-6)


def test_the_adapter_seeds_and_places_prompts():
    env = native(num_envs=3, shuffle=True)
    rollouts = []
    for _ in range(2):
        env.seed(5)
        rollouts.append([env.reset(), *(env.step(np.array([1, 0, 2])) for _ in range(5))])
    assert_same(*rollouts)
    unwrapped = gymnasium.make_vec("LitRLHF/Token-v0", num_envs=3).reset(seed=5)[0]
    assert_same({**rollouts[0][0]}, {**unwrapped})

    def prompts():
        return [int(info["prompt_index"]) for info in env.reset_infos]

    env.seed(5)
    env.reset()
    seeded = prompts()
    env.reset()
    assert prompts() != seeded  # a seed is used once, and so are options
    env.set_options({"prompt_index": np.array([3, 1, 2])})
    env.reset()
    assert prompts() == [3, 1, 2]
    env.reset()
    assert prompts() != [3, 1, 2]
    with pytest.raises(ValueError, match="one dict for all slots"):
        env.set_options([{"prompt_index": 1}] * 3)
    with pytest.raises(ValueError, match="max_episodes"):
        env.set_options({"max_episodes": 1})


def test_the_adapter_reaches_attributes_and_methods_of_the_slots():
    env = native(num_envs=3, render_mode="ansi")
    env.reset()
    assert env.get_attr("reward_mode") == ["immediate"] * 3 and env.get_attr("num_envs", indices=1) == [3]
    assert not env.has_attr("no_such_thing")
    assert [mask.shape for mask in env.env_method("action_masks", indices=[0, 2])] == [(6,), (6,)]
    assert [text.split("\n")[0] for text in env.env_method("render")] == ["slot 0", "slot 1", "slot 2"]
    assert env.env_is_wrapped(gymnasium.Wrapper) == [False] * 3
    env.set_attr("comment", "hello")
    assert env.env.unwrapped.comment == "hello"
    env.env_method("close")  # answers nothing
    with pytest.raises(ValueError, match="slots share 'comment'"):
        env.set_attr("comment", "hello", indices=[0])
    env.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"autoreset_mode": "NextStep"}, r"autoreset_mode \(AutoresetMode.NEXT_STEP\) must be 'SameStep'"),
        ({"autoreset_mode": "Disabled"}, r"autoreset_mode \(AutoresetMode.DISABLED\)"),
        ({"copy": False}, r"copy \(False\) must be True"),
        ({"reward_mode": "deferred"}, r"reward_mode \('deferred'\) must be 'immediate'"),
        ({"max_episodes": 5}, r"max_episodes \(5\) must be None"),
    ],
)
def test_the_adapter_refuses_what_would_teach_nonsense(arguments, message):
    with pytest.raises(ValueError, match=message):
        native(**arguments)


@pytest.mark.parametrize("env", [single, lambda: "LitRLHF/Token-v0", lambda: None])
def test_the_adapter_names_make_vec_to_those_who_hand_in_no_vector_env(env):
    with pytest.raises(ValueError, match=r"must be a vector env, as gymnasium.make_vec makes"):
        SB3VecEnv(env())


@pytest.mark.parametrize(("name", "value"), [("copy", False), ("max_episodes", 1)])
def test_the_adapter_refuses_to_be_set_to_what_would_teach_nonsense(name, value):
    env = native()
    before = env.get_attr(name)
    with pytest.raises(ValueError, match=rf"{name} \({value}\) must be"):
        env.set_attr(name, value)
    assert env.get_attr(name) == before
    setattr(env.env.unwrapped, name, value)  # past the adapter
    with pytest.raises(ValueError, match=rf"{name} \({value}\) must be"):
        env.reset()


@pytest.mark.parametrize(("name", "value"), [("reward_mode", "deferred"), ("autoreset_mode", "NextStep")])
def test_the_adapter_cannot_change_when_rewards_are_paid_or_slots_are_reset(name, value):
    env = native()
    before = env.get_attr(name)
    with pytest.raises(AttributeError, match=name):
        env.set_attr(name, value)
    assert env.get_attr(name) == before


def test_the_adapter_finds_attributes_and_methods_of_wrappers():
    env = SB3VecEnv(TransformReward(RecordEpisodeStatistics(TokenVectorEnv(num_envs=2, **task())), np.negative))
    (queue, _) = env.get_attr("return_queue")
    assert queue is env.env.env.return_queue and env.get_attr("reward_mode", indices=0) == ["immediate"]
    assert not env.has_attr("no_such_thing")
    env.set_attr("func", np.abs)
    assert env.env.func is np.abs and env.get_attr("func", indices=0) == [np.abs]
    assert not hasattr(env.env.unwrapped, "func")


@pytest.mark.parametrize("observation", ["dict", "flat"])
@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("observe", (), "must answer with one value for each of 2 slots"),
        ("state_dict", (), "must answer with one value for each of 2 slots"),
        ("reset", (), "is for all 2 slots together"),
        ("step", (np.array([END, END]),), "is for all 2 slots together"),
    ],
)
def test_the_adapter_refuses_to_deal_out_an_answer_that_is_for_all_slots_together(
    method, arguments, message, observation
):
    env = SB3VecEnv(TokenVectorEnv(num_envs=2, **task(observation=observation)))
    env.reset()
    before = env.env.state_dict()
    with pytest.raises(ValueError, match=rf"{method}\(\) {message}"):
        env.env_method(method, *arguments)
    assert env.env.state_dict() == before


def test_a_step_that_is_both_an_end_and_a_cut_bootstraps_from_nothing():
    class Both(gymnasium.vector.VectorWrapper):
        def step(self, actions):
            observations, rewards, terminated, _, infos = self.env.step(actions)
            return observations, rewards, terminated, np.ones_like(terminated), infos

    env = SB3VecEnv(Both(TokenVectorEnv(num_envs=2, **task(max_new_tokens=1))))
    env.reset()
    assert [info["TimeLimit.truncated"] for info in env.step(np.array([1, END]))[3]] == [False, False]


def test_pictures_are_those_of_the_slots():
    pytest.importorskip("PIL", reason="needs Pillow")
    adapter = native(num_envs=4, render_mode="rgb_array")
    adapter.reset()
    images = adapter.get_images()
    assert [image.shape for image in images] == [images[0].shape] * 4 and images[0].dtype == np.uint8
    assert all(np.array_equal(*pair) for pair in zip(images, adapter.env.render(), strict=True))
    height, width, _ = images[0].shape
    assert adapter.render().shape == (2 * height, 2 * width, 3)  # tiled by Stable-Baselines3, as its recorder wants it


@pytest.mark.parametrize("mode", [None, "ansi"])
def test_an_env_without_pictures_has_none_for_each_slot_as_a_dummy_vec_env(mode):
    for env in (native(num_envs=2, render_mode=mode), DummyVecEnv([lambda: TokenEnv(**task(render_mode=mode))] * 2)):
        env.reset()
        with pytest.warns(UserWarning, match="rgb_array"):
            assert env.get_images() == [None, None]
