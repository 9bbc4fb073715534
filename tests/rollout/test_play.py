import gc
import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.data.microbatches import MicroBatch
from lit_rlhf.data.prompts import PromptDataset
from lit_rlhf.engine.packing import Example, pack
from lit_rlhf.errors import UserError
from lit_rlhf.models import decoding
from lit_rlhf.models.decoding import SlotLayer
from lit_rlhf.models.graphs import GraphedStep
from lit_rlhf.models.policy import Policy
from lit_rlhf.rollout import play as rollout
from lit_rlhf.rollout.play import GenerationSettings, complete, episode_rows, play
from tests.tiny import EOS, VOCABULARY, random_examples, tiny_policy, tiny_tokenizer
from token_mdp import FinishReason, TokenVectorEnv

PROMPTS = [example.prompt_ids for example in random_examples(11, seed=5)]


def make_env(num_envs=4, group_size=1):
    return TokenVectorEnv(
        prompts=PROMPTS,
        num_envs=num_envs,
        vocab_size=VOCABULARY,
        stop_token_ids=[EOS, 7],
        max_new_tokens=10,
        reward_fn=lambda prompts, responses: np.array([len(r) for r in responses], float),
        reward_mode="deferred",
        copy=False,
        group_size=group_size,
    )


@pytest.mark.parametrize("num_slots", [1, 3, 12])
def test_a_group_has_one_prompt_and_draws_that_depend_on_seed_rank_and_episode_alone(num_slots):
    policy = tiny_policy()
    expected, played = (
        play(policy, make_env(slots, 3), GenerationSettings(), 12, stream=1, env_seed=0).episodes
        for slots in (4, num_slots)
    )
    responses = [episode.response_ids.tolist() for episode in played]
    assert responses == [episode.response_ids.tolist() for episode in expected]
    assert [episode.episode_id // 3 for episode in played] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    prompts = [{episode.prompt_index for episode in played[3 * g : 3 * g + 3]} for g in range(4)]
    assert [len(each) for each in prompts] == [1] * 4 and len(set.union(*prompts)) == 4
    assert all(len({tuple(r) for r in responses[3 * g : 3 * g + 3]}) > 1 for g in range(4))


def test_each_prompt_is_played_exactly_once_per_pass_and_the_queue_goes_on():
    env, policy = make_env(), tiny_policy()
    played = [play(policy, env, GenerationSettings(), n, env_seed=s).episodes for n, s in ((4, 0), (7, None))]
    indices = [episode.prompt_index for episodes in played for episode in episodes]
    assert [len(episodes) for episodes in played] == [4, 7]
    assert sorted(indices) == list(range(11))


def test_sampled_logprobs_are_those_of_the_full_forward_at_the_temperature():
    policy = tiny_policy()
    played = play(policy, make_env(), GenerationSettings(temperature=0.8), 11, env_seed=0)
    batch = pack([Example(e.prompt_ids, (e.response_ids,)) for e in played.episodes])
    logprobs, _ = policy(batch, 0.8)
    torch.testing.assert_close(
        torch.from_numpy(np.concatenate(played.sampled_logprobs)), logprobs, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("num_slots", [1, 3, 11])
def test_a_completion_does_not_depend_on_slots_or_neighbours(num_slots):
    policy, tokenizer = tiny_policy(), tiny_tokenizer()
    settings = GenerationSettings(max_new_tokens=12, num_slots=num_slots, seed=3)
    episodes = complete(policy, tokenizer, PromptBatch(PROMPTS, {}), settings)
    expected = complete(policy, tokenizer, PromptBatch(PROMPTS, {}), GenerationSettings(max_new_tokens=12, seed=3))
    assert [e.response_ids.tolist() for e in episodes] == [e.response_ids.tolist() for e in expected]
    assert [e.prompt_ids.tolist() for e in episodes] == [p.tolist() for p in PROMPTS]


def test_other_seeds_and_other_ranks_give_other_episodes():
    policy = tiny_policy()
    first, again, other_seed, other_rank = (
        [
            e.response_ids.tolist()
            for e in play(policy, make_env(), GenerationSettings(seed=seed), 11, rank, env_seed=0).episodes
        ]
        for seed, rank in ((0, 0), (0, 0), (1, 0), (0, 1))
    )
    assert first == again
    assert first != other_seed
    assert first != other_rank


def test_any_stop_token_ends_a_response_and_stays_in_it():
    policy = tiny_policy()
    episodes = play(policy, make_env(), GenerationSettings(), 60, env_seed=0).episodes
    stopped = [e for e in episodes if e.finish_reason is FinishReason.STOP]
    assert {int(e.response_ids[-1]) for e in stopped} == {EOS, 7}
    assert all(not set(e.response_ids[:-1].tolist()) & {EOS, 7} for e in episodes)
    assert all(len(e.response_ids) == 10 for e in episodes if e.finish_reason is FinishReason.LENGTH)


def test_a_completion_ends_at_any_stop_token_of_the_model():
    policy, stops = tiny_policy(), [EOS, *range(3, 20)]
    policy.model.generation_config.eos_token_id = stops
    prompts = PromptBatch([example.prompt_ids for example in random_examples(16)], {})
    episodes = complete(policy, tiny_tokenizer(), prompts, GenerationSettings(max_new_tokens=12))
    for episode in episodes:
        assert not set(episode.response_ids[:-1].tolist()) & set(stops)
        stopped = int(episode.response_ids[-1]) in stops
        assert episode.finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
    assert {int(episode.response_ids[-1]) for episode in episodes} & set(range(3, 20))


def test_pad_equal_to_eos_changes_no_episode():
    policy = tiny_policy()
    plain, pad_is_eos = (
        [e.response_ids.tolist() for e in complete(policy, tokenizer, PromptBatch(PROMPTS, {}), GenerationSettings(20))]
        for tokenizer in (tiny_tokenizer(), tiny_tokenizer(pad_is_eos=True))
    )
    assert plain == pad_is_eos


def test_prompts_that_leave_no_room_in_the_context_are_refused_with_the_numbers():
    numbers = r"\(11 tokens\) and max_new_tokens \({}\) do not fit .* context of 64; lower max_new_tokens to 53{}$"
    for max_new_tokens, other_remedy in ((60, " or max_prompt_length to 4"), (64, "")):
        with pytest.raises(UserError, match=numbers.format(max_new_tokens, other_remedy)):
            complete(
                tiny_policy(), tiny_tokenizer(), PromptBatch([np.arange(3, 14)], {}), GenerationSettings(max_new_tokens)
            )


def test_a_completion_does_not_depend_on_the_batches_of_predict():
    policy, tokenizer, data = tiny_policy(), tiny_tokenizer(), PromptDataset([PROMPTS[0]] * 6, {})
    settings = GenerationSettings(max_new_tokens=12)
    batches = [data[MicroBatch(np.arange(first, last), 1.0)] for first, last in ((0, 6), (0, 4), (4, 6))]
    whole, *parts = ([e.response_ids.tolist() for e in complete(policy, tokenizer, b, settings)] for b in batches)
    assert parts[0] + parts[1] == whole
    assert len({tuple(ids) for ids in whole}) > 4  # of one prompt: each place in the data has draws of its own


def test_settings_that_mean_nothing_are_refused():
    for temperature in (float("nan"), float("inf"), -1.0, 1e-40):
        with pytest.raises(UserError, match=r"temperature \(.*\) must be 0"):
            GenerationSettings(temperature=temperature)
    with pytest.raises(UserError, match="top_p"):
        GenerationSettings(top_p=0.0)
    with pytest.raises(UserError, match="max_new_tokens"):
        GenerationSettings(max_new_tokens=0)


def test_a_rollout_keeps_the_logits_of_no_earlier_step(monkeypatch):
    earlier, real = [], rollout.sample

    def watched(logits, *args):
        gc.collect()
        assert not any(reference() is not None for reference in earlier)
        earlier.append(weakref.ref(logits))
        return real(logits, *args)

    monkeypatch.setattr(rollout, "sample", watched)
    played = play(tiny_policy(), make_env(), GenerationSettings(), 6, env_seed=0)
    assert len(earlier) > 5
    assert [len(logprobs) for logprobs in played.sampled_logprobs] == [len(e.response_ids) for e in played.episodes]


@pytest.mark.parametrize("graphed", [False, True])
def test_the_cache_of_a_rollout_is_freed_when_it_ends(monkeypatch, graphed):
    """Not when Python next looks for cycles: it knows nothing of the memory of a GPU."""
    layers, real = [], SlotLayer.__init__

    def watched(self, *args):
        real(self, *args)
        layers.append(weakref.ref(self))

    def replays(function):
        output = function()
        return lambda: output

    monkeypatch.setattr(SlotLayer, "__init__", watched)
    if graphed:
        monkeypatch.setattr(decoding, "can_capture", lambda *_: True)
        monkeypatch.setattr(decoding, "GraphedStep", partial(GraphedStep, capture=replays))
    policy, env = tiny_policy(), make_env()
    gc.disable()
    try:
        play(policy, env, GenerationSettings(), 6, env_seed=0)
        assert layers and not any(layer() is not None for layer in layers)
    finally:
        gc.enable()


def test_a_step_costs_what_its_active_slots_cost(monkeypatch):
    """Parked slots leave the batch: rows decoded equal tokens written, whatever the order of finishing."""
    rows = []
    real = Policy.decode

    def counted(self, input_ids, position_ids, cache, attention_mask=None, layout=None, nodes=None):
        rows.append(len(input_ids) if nodes is None else len(nodes))
        return real(self, input_ids, position_ids, cache, attention_mask, layout, nodes)

    monkeypatch.setattr(Policy, "decode", counted)
    played = play(tiny_policy(), make_env(), GenerationSettings(), 4, env_seed=0)  # four slots, no refill
    lengths = sorted(len(episode.response_ids) for episode in played.episodes)
    assert lengths[0] < lengths[-1]
    assert sum(rows) == sum(lengths)


def test_a_completion_ends_with_the_first_stop_string_of_the_settings_or_the_models_own():
    policy, tokenizer = tiny_policy(), tiny_tokenizer()
    prompts, settings = PromptBatch(PROMPTS, {}), GenerationSettings(max_new_tokens=16, seed=3)
    free = [e.response_ids.tolist() for e in complete(policy, tokenizer, prompts, settings)]
    words = [token for response in free for token in response[1:-1]]
    stop = max(set(words) - {EOS}, key=words.count)
    text = f" w{stop}"  # of the token and the space before it, where it does not begin the response

    def cut(response):
        ends = [place + 1 for place, token in enumerate(response) if place and f"w{token}".startswith(text[1:])]
        return response[: ends[0]] if ends else response

    wanted = [cut(response) for response in free]
    assert wanted != free
    for strings, own in (((text,), None), ((), text), ((text,), [text, "w3 w3 w3 w3"])):
        policy.model.generation_config.stop_strings = own
        episodes = complete(policy, tokenizer, prompts, replace(settings, stop_strings=strings))
        assert [e.response_ids.tolist() for e in episodes] == wanted
        ended = [e.finish_reason for e, before in zip(episodes, free, strict=True) if len(e.response_ids) < len(before)]
        assert ended and set(ended) == {FinishReason.STOP}
    rows = episode_rows(tokenizer, complete(policy, tokenizer, prompts, settings))
    assert sum(text in row["completion"] for row in rows) >= len(ended), "the text stays in the completion"


def test_a_stop_string_without_text_is_refused_by_name():
    with pytest.raises(UserError, match=r"stop_strings \(\('',\)\) must be texts, none of them empty"):
        GenerationSettings(stop_strings=("",))
