import copy

import numpy as np
import pytest
import torch
from transformers import BloomConfig, MambaConfig, RwkvConfig

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.models import padded_decoding
from lit_rlhf.models.decoding import make_decoder
from lit_rlhf.models.padded_decoding import OwnCacheDecoder, RecomputingDecoder
from lit_rlhf.models.policy import Policy
from lit_rlhf.rollout.play import GenerationSettings, complete
from tests.tiny import SINKS, VOCABULARY, plain_logits, spread_model, tiny_tokenizer

TINY = {"vocab_size": VOCABULARY, "hidden_size": 32}
KINDS = {
    "keys": (SINKS, "together"),
    "positions by the mask": (BloomConfig(**TINY, n_layer=2, n_head=4), "together"),
    "a state": (MambaConfig(**TINY, num_hidden_layers=2, state_size=8), "by state"),
    "a state that padding would enter": (
        RwkvConfig(**TINY, num_hidden_layers=2, attention_hidden_size=32),
        "alone",
    ),
    "nothing": (SINKS, None),
}


def padded_policy(kind):
    config, caching = KINDS[kind]
    policy = Policy(spread_model(copy.deepcopy(config), "eager")).eval()
    policy.caching = caching
    return policy


@pytest.mark.parametrize("most", [8, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_full_forward_through_refills_and_parking(kind, most, monkeypatch):
    monkeypatch.setattr(padded_decoding, "MOST_COHORTS", most)
    policy, rng, S, L = padded_policy(kind), np.random.default_rng(0), 4, 30
    decoder = make_decoder(policy, S, L)
    ids, lengths, active = np.zeros((S, L), np.int64), np.zeros(S, np.int64), np.ones(S, bool)

    def refill(slot):
        lengths[slot] = rng.integers(2, 9)
        ids[slot] = 0
        ids[slot, : lengths[slot]] = rng.integers(3, VOCABULARY, lengths[slot])

    for slot in range(S):
        refill(slot)
    for step in range(20):
        logits = decoder.logits(ids, lengths, active)
        with torch.no_grad():
            rows = [plain_logits(policy.model, ids[s, : lengths[s]], "eager")[-1] for s in np.flatnonzero(active)]
        torch.testing.assert_close(logits, torch.stack(rows), rtol=1e-4, atol=1e-4)
        for slot in np.flatnonzero(active):
            if rng.random() < 0.2:
                refill(slot)
            else:
                ids[slot, lengths[slot]] = rng.integers(3, VOCABULARY)
                lengths[slot] += 1
        if step in (6, 10, 15):  # three of four slots park, one after the other
            active[rng.choice(np.flatnonzero(active))] = False


@pytest.mark.parametrize(("kind", "decoder"), [("keys", OwnCacheDecoder), ("nothing", RecomputingDecoder)])
def test_a_policy_decodes_as_it_was_found_to_be_able_to(kind, decoder):
    assert type(make_decoder(padded_policy(kind), 2, 8)) is decoder


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_completions_are_those_of_generate(kind):
    policy, tokenizer = padded_policy(kind), tiny_tokenizer()
    policy.model.generation_config.eos_token_id = tokenizer.eos_token_id
    prompts = [np.array(ids) for ids in ([5, 6, 7, 8, 9], [10], [11, 12, 13], [3, 4], [20, 21])]
    settings = GenerationSettings(max_new_tokens=8, temperature=0.0, num_slots=3)
    for prompt, episode in zip(prompts, complete(policy, tokenizer, PromptBatch(prompts, {}), settings), strict=True):
        given = torch.as_tensor(prompt)[None]
        asked = {"attention_mask": torch.ones_like(given), "pad_token_id": 0, "max_new_tokens": 8, "do_sample": False}
        own = policy.model.generate(given, **asked, suppress_tokens=[0])[0, len(prompt) :]
        free = policy.model.generate(given, **asked)[0, len(prompt) :]
        assert episode.response_ids.tolist() in (own.tolist(), free.tolist())


def test_a_token_is_read_once_and_not_again_at_each_step(monkeypatch):
    policy, read = padded_policy("keys"), []
    real = policy.model.model.forward

    def counted(*args, **kwargs):
        read.append(kwargs["input_ids"].numel())
        return real(*args, **kwargs)

    monkeypatch.setattr(policy.model.model, "forward", counted)
    decoder, ids, lengths = make_decoder(policy, 3, 24), np.full((3, 24), 5), np.array([8, 6, 3])
    for n in range(10):
        decoder.logits(ids, lengths + n)
    assert read == [3 * 8, *[3] * 9]


def test_rows_of_slots_that_left_go_with_their_cohort():
    decoder, ids, lengths = make_decoder(padded_policy("keys"), 2, 24), np.full((2, 24), 5), np.array([8, 6])
    decoder.logits(ids, lengths)
    ids[0, 0] = 9  # a new episode in the first slot
    decoder.logits(ids, lengths + 1)
    assert [cohort.slots.tolist() for cohort in decoder.cohorts] == [[-1, 1], [0]]
    decoder.logits(ids, lengths + 2, np.array([True, False]))
    assert [cohort.slots.tolist() for cohort in decoder.cohorts] == [[0]]
    decoder.clear()
    assert decoder.cohorts == []
