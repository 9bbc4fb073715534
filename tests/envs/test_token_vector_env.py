import copy
import io
from contextlib import redirect_stdout

import numpy as np
import pytest
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.vector import AutoresetMode
from token_tasks import END, VOCAB, assert_same, task, weighted_sum

from token_mdp import FinishReason, RewardError, TokenEnv, TokenVectorEnv
from token_mdp.slots import Slots


def make(num_envs=3, **changes):
    return TokenVectorEnv(num_envs=num_envs, **task(**changes))


def drain(env, rng, **reset):
    """Play a finite stream with random tokens; the transitions, those of parked slots included."""
    env.reset(**reset)
    transitions = []
    while env.active.any():
        transitions.append(env.step(rng.integers(VOCAB, size=env.num_envs)))
    return transitions


def test_same_step_refills_a_finished_slot_and_keeps_its_end_in_the_infos():
    env = make(num_envs=2, shuffle=False)
    assert env.autoreset_mode == env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    env.reset()  # prompts 0 and 1
    observations, rewards, terminated, truncated, infos = env.step(np.array([5, END]))
    np.testing.assert_array_equal(observations["input_ids"], [[1, 5, 0, 0, 0, 0, 0], [4, 5, 6, 0, 0, 0, 0]])
    np.testing.assert_array_equal(rewards, [0.0, 507.0])  # 100 (2 + 3) + 7
    np.testing.assert_array_equal(terminated, [False, True])
    assert not truncated.any() and infos["final_obs"][0] is None
    np.testing.assert_array_equal(infos["final_obs"][1]["input_ids"], [2, 3, END, 0, 0, 0, 0])
    final = infos["final_info"]
    assert (final["prompt_index"][1], final["finish_reason"][1], final["response_length"][1]) == (1, 1, 1)
    np.testing.assert_array_equal(infos["prompt_index"], [0, 2])
    np.testing.assert_array_equal(infos["episode_id"], [0, 2])


def test_the_terminal_observation_is_in_final_info_under_its_own_keys():
    env = make(num_envs=2, shuffle=False)
    env.reset()
    *_, infos = env.step(np.array([5, END]))
    for key in ("input_ids", "attention_mask", "length"):
        np.testing.assert_array_equal(infos["final_info"][key][1], infos["final_obs"][1][key])
        np.testing.assert_array_equal(infos["final_info"][f"_{key}"], [False, True])
        assert not infos["final_info"][key][0].any()


def test_next_step_spends_a_step_on_the_reset_and_ignores_its_action():
    env = make(num_envs=2, shuffle=False, autoreset_mode="NextStep")
    env.reset()
    observations, *_ = env.step(np.array([5, END]))
    np.testing.assert_array_equal(observations["input_ids"][1], [2, 3, END, 0, 0, 0, 0])
    observations, rewards, terminated, _, _ = env.step(np.array([END, VOCAB + 100]))
    np.testing.assert_array_equal(observations["input_ids"][1], [4, 5, 6, 0, 0, 0, 0])
    assert rewards[1] == 0.0 and terminated.tolist() == [True, False]


def test_disabled_leaves_resets_and_prompts_to_the_caller():
    env = make(num_envs=3, shuffle=False, autoreset_mode="Disabled")
    env.reset(options={"prompt_index": [2, 2, 2]})  # a group of one prompt
    env.step(np.array([END, 5, END]))
    with pytest.raises(ResetNeeded, match=r"slots \[0, 2\] have ended"):
        env.step(np.array([1, 1, 1]))
    options = {"reset_mask": np.array([True, False, True]), "prompt_index": np.array([0, 9, 1])}
    observations, infos = env.reset(options=options)
    assert "reset_mask" in options  # wrappers look for it after this call
    np.testing.assert_array_equal(observations["length"][:, 0], [1, 4, 2])
    np.testing.assert_array_equal(infos["_prompt_index"], [True, False, True])
    np.testing.assert_array_equal(infos["episode_id"], [3, 1, 4])
    assert infos["active"].all()


def test_a_partial_reset_tells_the_masks_of_all_slots():
    def below_four(prompts, responses):
        return np.arange(VOCAB) < np.full((len(responses), 1), 4) + 4 * np.array([[not len(r)] for r in responses])

    env = make(autoreset_mode="Disabled", action_mask=below_four)
    env.reset()
    env.step(np.array([END, 1, 1]))
    _, infos = env.reset(options={"reset_mask": np.array([True, False, False])})
    assert infos["action_mask"].sum(1).tolist() == [8, 4, 4] and infos["_action_mask"].all()
    np.testing.assert_array_equal(infos["action_mask"], env.action_masks())


@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
@pytest.mark.parametrize(("num_envs", "episodes"), [(4, 11), (4, 3), (1, 5), (3, 22)])
def test_a_finite_stream_drains_whole_episodes_each_prompt_once_per_pass(mode, num_envs, episodes):
    env = make(num_envs=num_envs, prompts=[[i % VOCAB] for i in range(11)], autoreset_mode=mode)
    transitions = drain(env, np.random.default_rng(0), seed=0, options={"max_episodes": episodes})
    done = np.array([transition[2] for transition in transitions])
    assert done.sum() == episodes
    indices, ids = [], []
    for _, _, terminated, _, infos in transitions:
        where = infos.get("final_info", infos)
        indices += where["prompt_index"][terminated].tolist()
        ids += where["episode_id"][terminated].tolist()
    assert sorted(ids) == list(range(episodes))
    if episodes % 11 == 0:
        assert sorted(indices) == sorted(list(range(11)) * (episodes // 11))
    else:
        assert len(set(indices)) == min(episodes, 11)


def test_a_parked_slot_stands_still():
    env = make(num_envs=3, max_episodes=2, reward_fn=weighted_sum)
    first, infos = env.reset(seed=0)
    assert infos["active"].tolist() == [True, True, False] and infos["episode_id"].tolist() == [0, 1, -1]
    assert first["length"][2] == 0
    observations, rewards, terminated, _, infos = env.step(np.array([END, 1, -5]))
    assert infos["active"].tolist() == [False, True, False]
    frozen = observations["input_ids"][0].copy()
    assert frozen.any()
    for _ in range(2):
        observations, rewards, terminated, truncated, infos = env.step(np.array([VOCAB, 2, VOCAB]))
        np.testing.assert_array_equal(observations["input_ids"][0], frozen)
        assert rewards[[0, 2]].tolist() == [0.0, 0.0]
        assert not terminated[[0, 2]].any() and not truncated[[0, 2]].any()
        assert infos["active"].tolist() == [False, True, False]


def test_a_drained_stream_wants_a_reset():
    env = make(num_envs=2, max_episodes=2)
    drain(env, np.random.default_rng(0), seed=0)
    with pytest.raises(ResetNeeded, match="all 2 slots are parked"):
        env.step(np.zeros(2, dtype=int))


def test_disabled_mode_parks_what_the_stream_has_no_episode_for():
    env = make(num_envs=2, max_episodes=3, autoreset_mode="Disabled")
    env.reset()
    env.step(np.array([END, END]))
    assert env.active.tolist() == [True, False]  # one episode left, for the first slot that ended
    env.reset(options={"reset_mask": np.array([True, False])})
    env.step(np.array([END, 0]))
    assert not env.active.any()


def test_streams_continue_the_prompt_queue_unless_seeded():
    env = make(num_envs=2, prompts=[[i % VOCAB] for i in range(10)], reward_mode="deferred")
    rng = np.random.default_rng(0)
    played = []
    for iteration in range(5):
        drain(env, rng, seed=7 if iteration == 0 else None, options={"max_episodes": 4})
        played += [episode.prompt_index for episode in env.pop_episodes()]
    assert sorted(played[:10]) == sorted(played[10:]) == list(range(10))
    drain(env, rng, seed=7, options={"max_episodes": 4})
    again = env.pop_episodes()
    assert [episode.prompt_index for episode in again] == played[:4]
    assert [episode.episode_id for episode in again] == [0, 1, 2, 3]


def test_the_max_episodes_option_holds_for_its_stream_only():
    env = make(num_envs=2, max_episodes=2)
    rng = np.random.default_rng(0)
    assert sum(t[2].sum() for t in drain(env, rng, options={"max_episodes": 5})) == 5
    assert sum(t[2].sum() for t in drain(env, rng)) == 2
    env.reset(options={"max_episodes": None})
    for _ in range(50):
        env.step(np.array([END, END]))
    assert env.active.all()


def test_deferred_rewards_equal_immediate_ones_and_are_scored_in_one_call():
    batches = []

    def reward(prompts, responses):
        batches.append(len(responses))
        return weighted_sum(prompts, responses)

    immediate = make(num_envs=4, max_episodes=13)
    expected = {}
    for _, rewards, terminated, _, infos in drain(immediate, np.random.default_rng(0), seed=5):
        for slot in np.flatnonzero(terminated):
            expected[infos["final_info"]["episode_id"][slot]] = rewards[slot]

    deferred = make(num_envs=4, max_episodes=13, reward_mode="deferred", reward_fn=reward)
    transitions = drain(deferred, np.random.default_rng(0), seed=5)
    assert all(not rewards.any() for _, rewards, *_ in transitions) and batches == []
    ids, rewards = deferred.flush_rewards()
    assert batches == [13]
    assert ids.tolist() == list(range(13)) and ids.dtype == np.int64 and rewards.dtype == np.float64
    assert rewards.tolist() == [expected[i] for i in range(13)]
    ids, rewards = deferred.flush_rewards()  # nothing is left
    assert ids.shape == rewards.shape == (0,) and batches == [13]


def test_episode_records_hold_what_was_played():
    env = make(num_envs=2, shuffle=False, max_episodes=3, reward_mode="deferred", reward_fn={"sum": (weighted_sum, 2)})
    env.reset()
    for actions in ([5, END], [END, 1], [0, 2], [0, 3], [0, 4]):
        env.step(np.array(actions))
    first, second, third = env.pop_episodes()
    assert (first.episode_id, first.prompt_index, first.finish_reason) == (0, 0, FinishReason.STOP)
    assert first.prompt_ids.tolist() == [1] and first.response_ids.tolist() == [5, END]
    assert first.components == {"sum": 119.0} and first.reward == 238.0  # 100·1 + 5 + 2·7
    assert second.response_ids.tolist() == [END]
    assert third.response_ids.tolist() == [1, 2, 3, 4] and third.finish_reason == FinishReason.LENGTH
    assert third.finish_reason.label == "length" and third.step_rewards is None


def test_episodes_can_be_taken_unscored():
    env = make(num_envs=1, max_episodes=1, reward_mode="deferred", reward_fn=lambda p, r: 1 / 0)
    drain(env, np.random.default_rng(0))
    (episode,) = env.pop_episodes(score=False)
    assert np.isnan(episode.reward)
    with pytest.raises(ValueError, match=r"score \('no'\) must be True or False"):
        env.pop_episodes(score="no")


def test_a_failed_flush_keeps_the_episodes():
    faults = [True]

    def reward(prompts, responses):
        if faults:
            raise ConnectionError("reward server")
        return np.ones(len(responses))

    env = make(num_envs=2, max_episodes=4, reward_mode="deferred", reward_fn=reward)
    drain(env, np.random.default_rng(0))
    with pytest.raises(RewardError, match="reward server"):
        env.flush_rewards()
    faults.clear()
    assert env.flush_rewards()[1].tolist() == [1.0] * 4


def test_a_seeded_reset_drops_episodes_that_were_not_flushed_and_another_keeps_them():
    env = make(num_envs=1, max_episodes=2, reward_mode="deferred")
    drain(env, np.random.default_rng(0), seed=0)
    env.reset()
    assert [episode.episode_id for episode in env.pop_episodes()] == [0, 1]
    drain(env, np.random.default_rng(0), seed=0)
    env.reset(seed=0)
    assert env.pop_episodes() == []


def test_reward_functions_cannot_reach_the_records():
    def vandal(prompts, responses):
        for ids in prompts + responses:
            ids[:] = 0
        return np.zeros(len(responses))

    env = make(num_envs=1, shuffle=False, max_episodes=1, reward_mode="deferred", reward_fn=vandal)
    env.reset()
    env.step(np.array([END]))
    (episode,) = env.pop_episodes()
    assert episode.prompt_ids.tolist() == [1] and episode.response_ids.tolist() == [END]


def test_immediate_mode_keeps_no_episodes():
    env = make()
    with pytest.raises(ValueError, match="reward_mode='deferred'"):
        env.flush_rewards()


def test_observations_are_fresh_unless_copy_is_off():
    env = make(num_envs=1)
    before, _ = env.reset(seed=0)
    after, *_ = env.step(np.array([5]))
    assert not any(np.shares_memory(before[key], after[key]) for key in before)
    env = make(num_envs=1, copy=False)
    before, _ = env.reset(seed=0)
    after, *_ = env.step(np.array([5]))
    assert all(np.shares_memory(before[key], after[key]) for key in before)


def test_masks_are_live_where_copy_is_off_and_say_the_same():
    def one_more(prompts, responses):  # the n-th token may be any up to n
        return np.arange(VOCAB) <= np.array([[len(response)] for response in responses])

    fresh, live = (make(action_mask=one_more, copy=copy) for copy in (True, False))
    (_, fresh_info), (_, live_info) = fresh.reset(seed=0), live.reset(seed=0)
    for action in (0, 1, END, 0):
        before, live_before = fresh_info, live_info
        *_, fresh_info = fresh.step(np.minimum([action, 0, 0], fresh_info["action_mask"].sum(1) - 1))
        *_, live_info = live.step(np.minimum([action, 0, 0], live_info["action_mask"].sum(1) - 1))
        assert_same(fresh_info, live_info)
        assert np.shares_memory(live_before["action_mask"], live_info["action_mask"])
        assert not np.shares_memory(before["action_mask"], fresh_info["action_mask"])


def test_infos_of_a_step_are_its_own():
    env = make(num_envs=2, copy=False)
    _, before = env.reset(seed=0)
    kept = {key: value.copy() for key, value in before.items()}
    for _ in range(6):
        env.step(np.array([END, 1]))
    assert_same(before, kept)


def test_max_episode_steps_shortens_the_episodes():
    env = make(num_envs=1, max_episode_steps=2)
    assert env.single_observation_space["input_ids"].shape == (5,)
    env.reset()
    env.step(np.array([1]))
    assert env.step(np.array([1]))[2][0]
    assert make(max_episode_steps=100).single_observation_space["input_ids"].shape == (7,)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([1, -1, 8], r"tokens \[-1, 8\] in slots \[1, 2\] are outside the vocabulary 0..7"),
        ([-1] * 12, r"tokens \[-1(, -1){9}\] in slots \[0, .*, 9\] and 2 more are outside"),
        ([1, 2], r"3 integer token ids, got shape \(2,\)"),
        (np.array([1, 2, 2**64 - 1], dtype=np.uint64), r"tokens \[18446744073709551615\] in slots \[2\]"),
        ([1.0, 2.0, 3.0], "float64"),
        ([[1], [2], [3]], r"got shape \(3, 1\)"),
        ([[1], [1, 2], [3]], r"got shape \(3,\) of object"),
    ],
)
def test_bad_actions_name_slots_and_tokens(actions, message):
    env = make(num_envs=max(len(actions), 3))
    env.reset()
    with pytest.raises(InvalidAction, match=message):
        env.step(actions)


def test_tokens_outside_the_action_mask_name_slots_and_tokens():
    def no_threes(prompts, responses):
        return np.arange(VOCAB) != np.full((len(responses), 1), 3)

    env = make(action_mask=no_threes)
    env.reset()
    assert env.action_masks().shape == (3, VOCAB) and not env.action_masks()[:, 3].any()
    env.step(np.array([1, 2, 4]))
    env.action_masks()[:] = True  # a copy: it allows nothing
    with pytest.raises(InvalidAction, match=r"tokens \[3\] in slots \[1\] are not allowed"):
        env.step(np.array([1, 3, 4]))


@pytest.mark.parametrize("mode", ["SameStep", "Disabled"])
def test_step_before_reset_and_after_a_failed_reward_is_refused(mode):
    env = make(autoreset_mode=mode, reward_fn=lambda p, r: [float("nan")] * len(r))
    for call in (lambda: env.step(np.zeros(3, dtype=int)), env.observe):
        with pytest.raises(ResetNeeded):
            call()
    env.reset()
    with pytest.raises(RewardError):
        env.step(np.array([1, END, 1]))
    with pytest.raises(ResetNeeded):
        env.step(np.array([1, 1, 1]))
    with pytest.raises(ResetNeeded, match="reset all slots"):
        env.reset(options={"reset_mask": np.array([False, True, False])})
    env.reset()
    env.step(np.array([1, 1, 1]))


def test_a_reset_that_fails_leaves_an_env_that_wants_another():
    values = [[1.0] * 3, None, [2.0] * 3, [0.0] * 3]
    env = make(shuffle=False, potential_fn=lambda prompts, responses: values.pop(0))
    env.reset()
    with pytest.raises(RewardError, match="potential_fn must return"):
        env.reset()
    with pytest.raises(ResetNeeded, match="also after a reward function"):
        env.step(np.full(3, END))
    env.reset(options={"prompt_index": 0})
    assert env.step(np.full(3, END))[1].tolist() == [100 + END - 2.0] * 3  # Φ of this reset, not of the first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": 1}, "'mask'"),
        ({"max_episodes": 0}, r"max_episodes \(0\)"),
        ({"prompt_index": 3}, r"prompt_index \(3\) must be an integer in 0..2"),
        ({"prompt_index": True}, r"prompt_index \(True\) must be an integer"),
        ({"prompt_index": [0, 1]}, r"got shape \(2,\)"),
        ({"prompt_index": [[0], [1, 2], [0]]}, r"prompt_index \(\[0\]\) must be an integer"),
        ({1: 2, "mask": 3}, r"\[1, 'mask'\] are unknown"),
        ({"reset_mask": [True, False, True]}, "must be a bool array"),
        ({"reset_mask": np.zeros(3, dtype=bool)}, "False everywhere"),
        ({"reset_mask": np.ones(3, dtype=bool), "max_episodes": 3}, "pass one of them"),
    ],
)
def test_bad_reset_options_are_refused(options, message):
    env = make()
    env.reset(seed=0)
    before = env.state_dict()
    with pytest.raises(ValueError, match=message):
        env.reset(options=options)
    assert env.state_dict() == before  # and change nothing


@pytest.mark.parametrize("steps", [0, 1, 7, 40])
@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
def test_a_restored_env_goes_on_bit_by_bit(mode, steps):
    def fresh():
        return make(
            num_envs=4,
            prompts=[[i % VOCAB] * (1 + i % 3) for i in range(9)],
            autoreset_mode=mode,
            reward_mode="deferred",
            process_reward_fn=weighted_sum,
            potential_fn=weighted_sum,
            action_mask=lambda p, r: np.ones((len(r), VOCAB)),
        )

    def go_on(env, rng):
        history = []
        for _ in range(30):
            history.append(env.step(rng.integers(VOCAB, size=4)))
        history += [[episode.as_plain() for episode in env.pop_episodes()], env.reset(options={"max_episodes": 6})]
        return history

    env = fresh()
    env.reset(seed=1)
    rng = np.random.default_rng(2)
    for _ in range(steps):
        env.step(rng.integers(VOCAB, size=4))
    state = env.state_dict()
    restored = fresh()
    restored.load_state_dict(state)
    assert_same(restored.observe(), env.observe())
    assert restored.np_random_seed == env.np_random_seed == 1
    assert_same(go_on(restored, np.random.default_rng(3)), go_on(env, np.random.default_rng(3)))


def test_a_restored_env_shows_what_the_other_showed():
    env, restored = (make(shuffle=False, autoreset_mode="Disabled", render_mode="ansi") for _ in range(2))
    env.reset(seed=1)
    env.step(np.array([1, END, 2]))
    restored.load_state_dict(env.state_dict())
    assert restored.render() == env.render()
    assert [text.rsplit("│ ")[-1] for text in env.render()] == ["not yet", "507 (stop)", "not yet"]
    with pytest.raises(ResetNeeded, match=r"slots \[1\] have ended"):
        restored.step(np.array([1, 1, 1]))


def test_state_is_plain_python_and_does_not_change_with_the_env():
    env = make(num_envs=2, reward_mode="deferred", potential_fn=weighted_sum)
    env.reset(seed=0)
    env.step(np.array([END, 1]))
    state = env.state_dict()
    text = repr(state)

    def kinds(value):
        if isinstance(value, dict):
            return {str}.union(*map(kinds, value.values()))
        return {type(value)}.union(*map(kinds, value)) if isinstance(value, list) else {type(value)}

    assert kinds(state) <= {str, int, float, bool, list, type(None)}
    drain(env, np.random.default_rng(0), options={"max_episodes": 3})
    assert repr(state) == text


def test_numpy_numbers_among_the_arguments_leave_a_state_that_torch_loads_with_weights_only():
    torch = pytest.importorskip("torch")
    changes = {"max_new_tokens": np.int64(4), "vocab_size": np.int32(VOCAB), "max_prompt_length": np.int64(2)}
    env = make(num_envs=np.int64(2), max_episodes=np.int64(5), **changes)
    for options in (None, {"max_episodes": np.int64(3), "prompt_index": np.int64(1)}):
        env.reset(seed=0, options=options)
        env.step(np.array([END, 1]))
        with io.BytesIO() as file:
            torch.save(env.state_dict(), file)
            file.seek(0)
            assert torch.load(file, weights_only=True) == env.state_dict()


def test_a_state_before_the_first_reset_or_after_a_failed_reward_restores_an_env_that_wants_a_reset():
    env = make(num_envs=2, reward_fn=lambda p, r: [float("nan")] * len(r))
    states = [env.state_dict()]
    env.reset(seed=0)
    with pytest.raises(RewardError):
        env.step(np.array([1, END]))
    states.append(env.state_dict())
    for state in states:
        restored = make(num_envs=2)
        restored.reset(seed=0)
        restored.load_state_dict(state)
        with pytest.raises(ResetNeeded):
            restored.step(np.array([1, 1]))


def test_a_restored_env_knows_how_much_of_its_prompts_was_cut():
    env, restored = (make(num_envs=3, shuffle=False, max_prompt_length=1) for _ in range(2))
    env.reset(seed=0)
    restored.load_state_dict(env.state_dict())
    assert restored.observe()[1]["prompt_tokens_cut"].tolist() == [0, 1, 2]


def test_a_long_state_loads_in_the_time_of_its_rows(monkeypatch):
    writes = []
    env, restored = (make(num_envs=2, max_new_tokens=50) for _ in range(2))
    env.reset(seed=0)
    for _ in range(40):
        env.step(np.array([1, 2]))
    monkeypatch.setattr(Slots, "append", lambda self, slots, tokens: writes.append(slots))
    restored.load_state_dict(env.state_dict())
    assert writes == []  # not token by token
    assert_same(restored.observe(), env.observe())


def test_a_seed_with_a_reset_mask_starts_the_queue_over_and_goes_on_with_the_stream():
    env = make(num_envs=2, reward_mode="deferred", autoreset_mode="Disabled")
    first = env.reset(seed=0)[1]
    env.step(np.array([END, END]))
    again = env.reset(seed=0, options={"reset_mask": np.ones(2, dtype=bool)})[1]
    assert again["prompt_index"].tolist() == first["prompt_index"].tolist() and again["episode_id"].tolist() == [2, 3]
    assert [episode.episode_id for episode in env.pop_episodes()] == [0, 1]


def test_the_first_reset_may_carry_a_mask_of_all_slots():
    env = make(num_envs=2, shuffle=False, autoreset_mode="Disabled")
    _, infos = env.reset(options={"reset_mask": np.ones(2, dtype=bool), "prompt_index": 1})
    assert infos["prompt_index"].tolist() == [1, 1]


@pytest.mark.parametrize("loaded", [False, True])
def test_a_first_reset_with_a_mask_starts_a_stream_of_max_episodes(loaded):
    env = make(num_envs=2, max_episodes=3, autoreset_mode="Disabled")
    if loaded:
        env.load_state_dict(make(num_envs=2, max_episodes=3, autoreset_mode="Disabled").state_dict())
    every = {"reset_mask": np.ones(2, dtype=bool)}
    played = []
    for _ in range(2):
        played += env.reset(seed=0, options=every)[1]["episode_id"][env.active].tolist()
        env.step(np.array([END, END]))
    assert played == [0, 1, 2] and not env.active.any()


def test_a_slot_without_an_episode_has_the_prompt_minus_one():
    env = make(num_envs=2, max_episodes=1)
    assert env.reset(seed=0)[1]["prompt_index"][1] == -1


def test_the_reward_mode_is_fixed_for_the_life_of_an_env():
    env = make()
    with pytest.raises(AttributeError, match="reward_mode"):
        env.reward_mode = "deferred"
    assert (env.reward_mode, make(reward_mode="deferred").reward_mode) == ("immediate", "deferred")


def test_a_state_of_another_env_is_refused():
    env = make(num_envs=2)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="num_envs = 2, this env 3"):
        make(num_envs=3).load_state_dict(env.state_dict())
    for changes, message in (
        ({"prompts": [[1]]}, "prompts = 3 prompts, sha256 .*, this env 1 prompts"),
        ({"prompts": [[1], [2, 3], [4, 5, 0]]}, "prompts = 3 prompts, sha256 .*, this env 3 prompts"),
        ({"prompts": [[1, 2], [3], [4, 5, 6]]}, "prompts = 3 prompts, sha256 .*, this env 3 prompts"),
        ({"shuffle": False}, "shuffle = True, this env False"),
        ({"max_prompt_length": 9}, "max_prompt_length = 3, this env 9"),
        ({"autoreset_mode": "NextStep"}, "autoreset_mode = SameStep, this env NextStep"),
        ({"max_new_tokens": 5}, "max_new_tokens = 4, this env 5"),
        ({"vocab_size": 9}, "vocab_size = 8, this env 9"),
        ({"stop_token_ids": [6, END]}, r"stop_token_ids = \[7\], this env \[6, 7\]"),
        ({"limit": "truncate"}, "limit = terminate, this env truncate"),
        ({"reward_mode": "deferred"}, "reward_mode = immediate, this env deferred"),
        ({"reward_fn": {"a": weighted_sum, "b": weighted_sum}}, "reward components = 1, this env 2"),
        ({"potential_fn": weighted_sum}, "pays steps = False, this env True"),
        ({"observation": "flat"}, "flat = False, this env True"),
    ):
        other = make(num_envs=2, **changes)
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(env.state_dict())
    with pytest.raises(ValueError, match="the saved state has prompts = None"):
        make(num_envs=2).load_state_dict({})
    make(num_envs=2).load_state_dict(env.state_dict())


def leaves(state, path=()):
    for name, value in state.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))


def test_a_damaged_state_is_refused_and_changes_nothing():
    def damaged(path, damage):
        state = copy.deepcopy(sound)
        inner = state
        for name in path[:-1]:
            inner = inner[name]
        damage(inner, path[-1])
        return state

    def remove(inner, name):
        del inner[name]

    def empty(inner, name):
        inner[name] = None

    def shorten(inner, name):
        inner[name] = inner[name][:1]

    env, other = make(num_envs=2, reward_mode="deferred"), make(num_envs=2, reward_mode="deferred")
    env.reset(seed=0)
    env.step(np.array([END, 1]))
    sound = env.state_dict()
    other.reset(seed=5)
    before = other.state_dict()
    paths = [path for path in leaves(sound) if path[0] not in ("task", "np_random_seed", "ready")]
    cases = [(path, remove) for path in paths] + [
        (path, empty) for path in paths if path[-1] not in ("remaining", "np_random_seed")
    ]
    cases += [(("stream", name), shorten) for name in ("status", "prompt_index", "episode_id", "responses")]
    cases += [(("rewards", "totals"), shorten), (("finish_reason",), shorten), (("stream", "queue", "order"), shorten)]
    states = [damaged(*case) for case in cases] + [damaged(("ready",), remove), damaged(("np_random_seed",), remove)]
    far = copy.deepcopy(sound)
    far["stream"]["prompt_index"][0] = 99
    for state in [*states, far, None, {"task": 3}]:
        with pytest.raises(ValueError, match="the saved state"):
            other.load_state_dict(state)
        assert other.state_dict() == before
    other.step(np.array([1, 1]))  # goes on
    other.load_state_dict(sound)
    assert_same(other.observe(), env.observe())


def test_a_seeded_reset_is_the_same_whatever_was_played_before():
    arguments = {"prompts": [[1, 2], [3, 4], [5, 6]], "max_prompt_length": 1}  # all of them are cut
    fresh, used = make(num_envs=4, **arguments), make(num_envs=4, **arguments)
    drain(used, np.random.default_rng(0), options={"max_episodes": 9})
    left = fresh.reset(seed=3, options={"max_episodes": 2})  # slots 2 and 3 get no episode
    assert_same(used.reset(seed=3, options={"max_episodes": 2}), left)


def test_a_restored_env_asks_the_action_mask_at_once():
    def no_threes(prompts, responses):
        return np.arange(VOCAB) != np.full((len(responses), 1), 3)

    env = make(action_mask=no_threes)
    env.reset(seed=0)
    restored = make(action_mask=no_threes)
    restored.load_state_dict(env.state_dict())
    with pytest.raises(InvalidAction, match="not allowed"):
        restored.step(np.array([3, 1, 1]))


@pytest.mark.parametrize("call", ["load_state_dict", "observe"])
def test_an_action_mask_that_fails_on_a_restored_state_leaves_an_env_that_wants_a_reset(call):
    faults = []

    def no_threes(prompts, responses):
        if faults:
            raise KeyError("grammar")
        return np.arange(VOCAB) != np.full((len(responses), 1), 3)

    env = make(action_mask=no_threes)
    env.reset(seed=0)
    restored = make(action_mask=no_threes)
    if call == "observe":
        restored.load_state_dict(env.state_dict())
    faults.append(True)
    with pytest.raises(ValueError, match="action_mask raised KeyError"):
        restored.observe() if call == "observe" else restored.load_state_dict(env.state_dict())
    with pytest.raises(ResetNeeded, match="or action_mask has failed"):
        restored.step(np.array([3, 1, 1]))


def test_the_action_mask_is_not_asked_about_a_drained_stream():
    def stacked(prompts, responses):
        return np.stack([np.arange(VOCAB) != 3 for _ in responses])  # fails for none

    env = make(num_envs=2, max_episodes=2, action_mask=stacked)
    env.reset(seed=0)
    *_, infos = env.step(np.array([END, END]))
    assert not infos["active"].any()


def test_render_shows_every_slot():
    env = make(num_envs=2, shuffle=False, max_episodes=1, render_mode="ansi")
    with pytest.raises(ResetNeeded, match="render"):
        env.render()
    env.reset()
    env.step(np.array([END, 0]))
    playing, parked = env.render()
    assert playing == "slot 0\nprompt   │ 1\nresponse │ 7\nreward   │ 107 (stop)"
    assert parked.endswith("none: this slot has no episode")
    env.reset(options={"max_episodes": 2})
    env.step(np.array([1, 1]))
    env.reset()  # a stream of one episode again: nothing is left of the other in slot 1
    assert env.render()[1] == "slot 1\nprompt   │ \nresponse │ \nreward   │ none: this slot has no episode"


def test_render_shows_the_new_episode_of_a_refilled_slot():
    env = make(num_envs=1, shuffle=False, render_mode="ansi")
    env.reset()
    env.step(np.array([END]))
    assert env.render() == ("slot 0\nprompt   │ 2 3\nresponse │ \nreward   │ not yet",)


def test_human_prints_each_episode_when_it_ends():
    env = make(num_envs=2, shuffle=False, render_mode="human")
    with redirect_stdout(io.StringIO()) as shown:
        env.reset()
        env.step(np.array([1, END]))
        env.step(np.array([1, END]))
        assert env.render() is None
    assert shown.getvalue() == (
        "slot 1\nprompt   │ 2 3\nresponse │ 7\nreward   │ 507 (stop)\n"
        "slot 1\nprompt   │ 4 5 6\nresponse │ 7\nreward   │ 1507 (stop)\n"
    )


def test_single_and_vector_env_have_equal_spaces():
    for observation in ("dict", "flat"):
        single, vector = TokenEnv(**task(observation=observation)), make(observation=observation)
        assert vector.single_observation_space == single.observation_space
        assert vector.single_action_space == single.action_space
        assert vector.reset()[0] in vector.observation_space


def test_after_a_failed_flush_the_episodes_under_way_go_on():
    faults = [True]
    env = make(reward_mode="deferred", reward_fn=lambda p, r: [None if faults else 1.0] * len(r))
    env.reset(seed=0)
    env.step(np.array([END, 1, 1]))
    with pytest.raises(RewardError):
        env.pop_episodes()
    env.step(np.array([1, END, 1]))
    faults.clear()
    assert env.flush_rewards()[0].tolist() == [0, 1]
