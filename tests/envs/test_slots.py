import numpy as np
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
