import numpy as np
import pytest
from token_tasks import assert_same, make

from token_mdp.slots import Slots


def test_observations_are_fresh_unless_copy_is_off():
    env = make(num_envs=1)
    before, _ = env.reset(seed=0)
    after, *_ = env.step(np.array([5]))
    assert not any(np.shares_memory(before[key], after[key]) for key in before)
    env = make(num_envs=1, copy=False)
    before, _ = env.reset(seed=0)
    after, *_ = env.step(np.array([5]))
    assert all(np.shares_memory(before[key], after[key]) for key in before)


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


@pytest.mark.parametrize("flat", [False, True])
def test_prompt_and_response_come_back_from_whatever_layout(flat):
    slots = Slots(2, max_prompt_length=3, max_new_tokens=4, flat=flat)
    slots.begin(0, np.array([1, 2]))
    slots.begin(1, np.array([3]))
    slots.append(np.array([0, 1]), np.array([5, 6]))
    slots.append(np.array([1]), np.array([7]))
    assert [slots.prompt(slot).tolist() for slot in (0, 1)] == [[1, 2], [3]]
    assert [ids.tolist() for ids in slots.responses(np.array([0, 1]))] == [[5], [6, 7]]
    assert slots.response_lengths(np.array([1, 0])).tolist() == [2, 1]
    layout = {
        False: [[1, 2, 5, 0, 0, 0, 0], [3, 6, 7, 0, 0, 0, 0]],
        True: [[-1, 1, 2, 5, -1, -1, -1], [-1, -1, 3, 6, 7, -1, -1]],
    }
    observed = slots.observation(copy=True)
    assert (observed if flat else observed["input_ids"]).tolist() == layout[flat]


@pytest.mark.parametrize("flat", [False, True])
def test_several_tokens_at_once_are_the_same_as_one_after_another(flat):
    at_once, one_by_one = (Slots(2, 3, 4, flat) for _ in range(2))
    for slots in (at_once, one_by_one):
        slots.begin(1, np.array([1, 2]))
    at_once.extend(1, np.array([5, 6, 7]))
    for token in (5, 6, 7):
        one_by_one.append(np.array([1]), np.array([token]))
    assert_same(at_once.observation(copy=True), one_by_one.observation(copy=True))
    assert at_once.response(1).tolist() == one_by_one.response(1).tolist() == [5, 6, 7]


@pytest.mark.parametrize("flat", [False, True])
def test_nothing_of_an_episode_is_left_in_its_slot(flat):
    used, fresh = Slots(2, 3, 4, flat), Slots(2, 3, 4, flat)
    for slot in (0, 1):
        used.begin(slot, np.array([4, 5, 6]))
        used.extend(slot, np.array([1, 1, 1, 1]))
    used.begin(0, np.array([2]))
    fresh.begin(0, np.array([2]))
    used.clear(1)
    assert_same(used.observation(copy=True), fresh.observation(copy=True))
    assert used.response(0).tolist() == used.response(1).tolist() == used.prompt(1).tolist() == []
