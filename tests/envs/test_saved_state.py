import copy
import io

import numpy as np
import pytest
from gymnasium.error import InvalidAction, ResetNeeded
from token_tasks import END, VOCAB, assert_same, drain, make, weighted_sum

from token_mdp import RewardError


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
        ({"group_size": 2}, "group_size = 1, this env 2"),
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
    older = env.state_dict()
    del older["task"]["group_size"]  # which states of before groups do not have
    make(num_envs=2).load_state_dict(older)
    with pytest.raises(ValueError, match="group_size = 1, this env 2"):
        make(num_envs=2, group_size=2).load_state_dict(older)


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
