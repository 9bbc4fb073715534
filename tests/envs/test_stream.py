import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from token_tasks import END, VOCAB, assert_same, drain, make, weighted_sum


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


@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
@pytest.mark.parametrize("num_envs", [1, 4, 5])
def test_each_prompt_is_dealt_to_a_group_whatever_the_slots(mode, num_envs):
    env = make(num_envs=num_envs, prompts=[[i % VOCAB] for i in range(6)], autoreset_mode=mode, group_size=3)
    rng, prompts = np.random.default_rng(0), {}
    for seed in (0, None):  # the second stream goes on in the pass
        for _, _, ended, _, infos in drain(env, rng, seed=seed, options={"max_episodes": 9}):
            where = infos.get("final_info", infos)
            prompts |= dict(
                zip(where["episode_id"][ended].tolist(), where["prompt_index"][ended].tolist(), strict=True)
            )
    groups = [{prompts[3 * group + i] for i in range(3)} for group in range(6)]
    assert sorted(map(min, groups)) == list(range(6)) and {len(group) for group in groups} == {1}


def test_a_stream_begins_with_a_whole_group_where_the_last_one_was_cut_short():
    env = make(num_envs=2, prompts=[[1], [2], [3]], shuffle=False, group_size=3)
    assert env.reset(seed=0)[1]["prompt_index"].tolist() == [0, 0]
    assert env.reset()[1]["prompt_index"].tolist() == [1, 1] and env._stream.episode_id.tolist() == [3, 4]
    options = {"reset_mask": np.array([True, False])}
    assert env.reset(seed=0, options=options)[1]["episode_id"].tolist() == [6, 4]


def test_groups_are_whole_and_dealt_by_the_queue_alone():
    with pytest.raises(ValueError, match=r"max_episodes \(7\) must be a multiple of group_size \(3\)"):
        make(group_size=3, max_episodes=7)
    env = make(group_size=3)
    with pytest.raises(ValueError, match=r"max_episodes \(4\) must be a multiple of group_size \(3\)"):
        env.reset(seed=0, options={"max_episodes": 4})
    with pytest.raises(ValueError, match=r"prompt_index places prompts and group_size \(3\) has them dealt"):
        env.reset(seed=0, options={"prompt_index": 1})
    with pytest.raises(ValueError, match=r"group_size \(0\) must be an integer"):
        make(group_size=0)


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


def test_a_slot_without_an_episode_has_the_prompt_minus_one():
    env = make(num_envs=2, max_episodes=1)
    assert env.reset(seed=0)[1]["prompt_index"][1] == -1


def test_a_seeded_reset_is_the_same_whatever_was_played_before():
    arguments = {"prompts": [[1, 2], [3, 4], [5, 6]], "max_prompt_length": 1}  # all of them are cut
    fresh, used = make(num_envs=4, **arguments), make(num_envs=4, **arguments)
    drain(used, np.random.default_rng(0), options={"max_episodes": 9})
    left = fresh.reset(seed=3, options={"max_episodes": 2})  # slots 2 and 3 get no episode
    assert_same(used.reset(seed=3, options={"max_episodes": 2}), left)
