import numpy as np
from token_tasks import END, VOCAB, assert_same, make


def test_the_terminal_observation_is_in_final_info_under_its_own_keys():
    env = make(num_envs=2, shuffle=False)
    env.reset()
    *_, infos = env.step(np.array([5, END]))
    for key in ("input_ids", "attention_mask", "length"):
        np.testing.assert_array_equal(infos["final_info"][key][1], infos["final_obs"][1][key])
        np.testing.assert_array_equal(infos["final_info"][f"_{key}"], [False, True])
        assert not infos["final_info"][key][0].any()


def test_a_partial_reset_tells_the_masks_of_all_slots():
    def below_four(prompts, responses):
        return np.arange(VOCAB) < np.full((len(responses), 1), 4) + 4 * np.array([[not len(r)] for r in responses])

    env = make(autoreset_mode="Disabled", action_mask=below_four)
    env.reset()
    env.step(np.array([END, 1, 1]))
    _, infos = env.reset(options={"reset_mask": np.array([True, False, False])})
    assert infos["action_mask"].sum(1).tolist() == [8, 4, 4] and infos["_action_mask"].all()
    np.testing.assert_array_equal(infos["action_mask"], env.action_masks())


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


def test_the_action_mask_is_not_asked_about_a_drained_stream():
    def stacked(prompts, responses):
        return np.stack([np.arange(VOCAB) != 3 for _ in responses])  # fails for none

    env = make(num_envs=2, max_episodes=2, action_mask=stacked)
    env.reset(seed=0)
    *_, infos = env.step(np.array([END, END]))
    assert not infos["active"].any()
