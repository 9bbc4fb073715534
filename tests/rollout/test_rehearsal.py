import numpy as np

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.engine.memory import LiveMemory, counting, shapes
from lit_rlhf.rollout.play import GenerationSettings, make_env
from lit_rlhf.rollout.rehearsal import RehearsedPlay, silence
from lit_rlhf.rollout.scoring import Rewards
from tests.tiny import tiny_policy, tiny_tokenizer


def asked(prompts, responses, **columns):
    raise AssertionError("a function is not called")


def test_episodes_are_as_long_as_they_may_be_and_the_policy_acts_twice():
    with shapes():
        policy = tiny_policy()
    calls, decode = [], policy.decode
    policy.decode = lambda *args, **kwargs: calls.append(args[0].shape) or decode(*args, **kwargs)
    prompts = PromptBatch([np.array([3, 4, 5]), np.array([6, 7])], {})
    env = make_env(policy, tiny_tokenizer(), prompts, 2, 5, (), None)
    phases, memory = [], LiveMemory()
    with counting(memory):
        played = RehearsedPlay(phases.append).play(policy, env, GenerationSettings(), 4, env_seed=0)
    assert [len(episode.response_ids) for episode in played.episodes] == [5] * 4
    assert [len(row) for row in played.sampled_logprobs] == [5] * 4
    assert calls == [(1, 5), (2, 1)]  # both prompts packed in a row; then a token for each of two slots
    assert phases == ["rollout", "reward"]
    # Keys and values of 2 layers, 2 slots, 2 heads, 3 + 5 tokens, 8 numbers each, in float32.
    assert memory.peaks[""] > 2 * 2 * 2 * 2 * 8 * 8 * 4


def test_functions_say_nothing_and_keep_their_names():
    rewards = Rewards({"one": asked, "two": (asked, 0.5)})
    silence(rewards)
    for term in rewards.terms:
        np.testing.assert_array_equal(term.reward([np.array([1])], [np.array([2])]), [0.0])
        assert str(term.reward).endswith("asked")
    assert [term.weight for term in rewards.terms] == [1.0, 0.5]
