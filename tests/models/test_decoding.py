from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaModel

from lit_rlhf.models import decoding
from lit_rlhf.models.decoding import SlotDecoder, SlotLayer, sample
from tests.tiny import ARCHITECTURES, VOCABULARY, plain_logits, tiny_policy


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_slot_cache_equals_the_full_forward_through_refills_and_parking(architecture):
    policy = tiny_policy(architecture)
    rng = np.random.default_rng(0)
    S, L = 4, 30
    decoder, told = SlotDecoder(policy, S, L), SlotDecoder(policy, S, L)
    ids, lengths, active = np.zeros((S, L), np.int64), np.zeros(S, np.int64), np.ones(S, bool)
    episodes = np.arange(S)

    def refill(slot):
        episodes[slot] = episodes.max() + 1
        lengths[slot] = rng.integers(2, 9)
        ids[slot] = 0
        ids[slot, : lengths[slot]] = rng.integers(3, VOCABULARY, lengths[slot])

    for slot in range(S):
        refill(slot)
    for step in range(20):
        logits = decoder.logits(ids, lengths, active)
        with torch.no_grad():
            expected = torch.stack(
                [plain_logits(policy.model, ids[s, : lengths[s]])[-1] for s in np.flatnonzero(active)]
            )
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(told.logits(ids, lengths, active, episodes), logits)
        for slot in np.flatnonzero(active):
            if rng.random() < 0.15:
                refill(slot)
            else:
                ids[slot, lengths[slot]] = rng.integers(3, VOCABULARY)
                lengths[slot] += 1
        if step in (6, 10, 15):  # three of four slots park, one after the other
            active[rng.choice(np.flatnonzero(active))] = False


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("size", [2, 5])
def test_prompts_that_slots_of_a_group_lend_give_the_logits_of_the_full_forward(architecture, size):
    policy, rng = tiny_policy(architecture), np.random.default_rng(0)
    S, L = 6, 24
    decoder, prefilled = SlotDecoder(policy, S, L), []
    prefill = decoder._prefill
    decoder._prefill = lambda slots, *args: prefilled.append(len(slots)) or prefill(slots, *args)
    prompts = [rng.integers(3, VOCABULARY, rng.integers(1, 9)) for _ in range(20)]
    ids, lengths, active = np.zeros((S, L), np.int64), np.zeros(S, np.int64), np.ones(S, bool)
    episodes, dealt = np.zeros(S, np.int64), 0

    def refill(slot):
        nonlocal dealt
        prompt = prompts[dealt // size]
        ids[slot], lengths[slot], episodes[slot] = 0, len(prompt), dealt
        ids[slot, : len(prompt)] = prompt
        dealt += 1

    for slot in range(S):
        refill(slot)
    for step in range(16):
        logits = decoder.logits(ids, lengths, active, episodes, episodes // size)
        rows = [ids[s, : lengths[s]] for s in np.flatnonzero(active)]
        with torch.no_grad():
            expected = torch.stack([plain_logits(policy.model, row)[-1] for row in rows])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        for slot in np.flatnonzero(active):
            if rng.random() < 0.25:
                refill(slot)
            else:
                ids[slot, lengths[slot]] = rng.integers(3, VOCABULARY)
                lengths[slot] += 1
        if step in (6, 10):
            active[rng.choice(np.flatnonzero(active))] = False
    assert sum(prefilled) < 0.7 * dealt


@pytest.mark.parametrize("told", [False, True])
def test_a_step_reads_no_token_of_finished_slots_and_the_newest_alone_where_episodes_are_named(told):
    class Watched(np.ndarray):
        """Adds up the cells that are taken out of it."""

        read = 0

        def __getitem__(self, index):
            taken = np.asarray(self).__getitem__(index)
            Watched.read += taken.size
            return taken

    policy, S, L = tiny_policy(), 8, 32
    decoder = SlotDecoder(policy, S, L)
    ids, lengths, active = np.full((S, L), 5), np.full(S, 9), np.arange(S) < 2
    episodes = np.arange(S) if told else None
    decoder.logits(ids, lengths, active, episodes)
    decoder.logits(ids.view(Watched), lengths + 1, active, episodes)
    assert Watched.read <= (4 if told else 2 * 9 + 4)


class NewName(LlamaModel):
    def forward(self, input_ids, position_ids, attention_mask, use_cache, cache):
        return SimpleNamespace(last_hidden_state=cache)


class OldName(LlamaModel):
    def forward(self, input_ids, position_ids, attention_mask, use_cache, past_key_values):
        return SimpleNamespace(last_hidden_state=past_key_values)


@pytest.mark.parametrize("trunk", [NewName, OldName])
def test_a_model_is_given_its_cache_by_the_name_that_it_has_for_it(trunk):
    policy = tiny_policy()
    policy.model.model = trunk(policy.model.config)
    cached = torch.randn(2, 1, policy.model.config.hidden_size)
    ids = torch.ones(2, 1, dtype=torch.int64)
    assert torch.equal(policy.decode(ids, ids, cached), policy.head(cached[:, -1]))


def test_clear_forgets_keys_of_old_weights():
    policy = tiny_policy()
    decoder = SlotDecoder(policy, 1, 8)
    ids = np.array([[5, 6, 7, 8, 0, 0, 0, 0]])
    decoder.logits(ids, np.array([3]))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    decoder.clear()
    with torch.no_grad():
        expected = plain_logits(policy.model, ids[0, :4])[-1:]
    torch.testing.assert_close(decoder.logits(ids, np.array([4])), expected, rtol=1e-4, atol=1e-4)


def test_keys_are_cached_in_the_precision_of_values_under_autocast():
    policy, decoders = tiny_policy(), []
    ids, lengths = np.array([[5, 6, 7, 8, 0, 0, 0, 0]] * 2), np.array([3, 2])
    for enabled in (False, True):
        decoder = SlotDecoder(policy, 2, 8)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            decoder.logits(ids, lengths)
            logits = decoder.logits(ids, lengths + 1)
        decoders.append((decoder, logits.float()))
    (_, exact), (decoder, rounded) = decoders
    assert all(layer.keys.dtype == layer.values.dtype == torch.bfloat16 for layer in decoder.layers)
    assert (rounded - exact).norm() / exact.norm() < 0.02  # bfloat16 keeps eight bits


LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def frequencies(**settings):
    """Shares of each token over evenly spread draws: exact up to the grid."""
    n = 20_000
    uniforms = (torch.arange(n) + 0.5) / n
    tokens, logprobs = sample(LOGITS.expand(n, 4), uniforms, **settings)
    return torch.bincount(tokens, minlength=4) / n, tokens, logprobs


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),  # p^2 / sum
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.75}, [0.625, 0.375, 0, 0]),  # 0.5 is not enough, 0.8 is
        ({"min_p": 0.2}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),  # 0.05 < 0.2 * 0.5
        ({"temperature": 0.0}, [1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_from_the_distribution_that_their_logprobs_name(settings, expected):
    shares, tokens, logprobs = frequencies(**settings)
    torch.testing.assert_close(shares, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=2e-4)
    torch.testing.assert_close(logprobs.exp(), torch.tensor(expected, dtype=torch.float32)[tokens])


def test_top_k_keeps_k_tokens_whatever_ties():
    tokens, logprobs = sample(torch.zeros(1000, 6), torch.arange(1000) / 1000, top_k=2)
    assert len(tokens.unique()) == 2
    torch.testing.assert_close(logprobs.exp(), torch.full((1000,), 0.5))


def test_a_rare_token_at_the_end_of_the_vocabulary_is_drawn():
    logits = torch.tensor([[1 - 8e-7, 8e-7]]).log()
    tokens, _ = sample(logits.expand(3, 2), torch.tensor([1 - 2**-24, 1 - 2**-21, 1 - 2**-19]))
    assert tokens.tolist() == [1, 1, 0]  # 2^-21 < 8e-7 < 2^-19


def test_a_draw_at_the_very_end_never_lands_on_a_forbidden_token():
    logits = torch.tensor([[0.0, 1.0, float("-inf")]])
    for uniform in (0.0, 1 - 2**-24):
        tokens, logprobs = sample(logits, torch.tensor([uniform]))
        assert tokens.item() < 2
        assert logprobs.isfinite().all()


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9, "top_k": 30}])
def test_tokens_are_drawn_where_determinism_is_asked_for(monkeypatch, settings):
    logits = 3 * torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    uniforms = torch.arange(200) / 200
    tokens, logprobs = sample(logits, uniforms, **settings)
    real = torch.Tensor.cumsum

    def as_on_cuda(self, dim):
        if self.is_floating_point() and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")
        return real(self, dim)

    monkeypatch.setattr(torch.Tensor, "cumsum", as_on_cuda)
    torch.use_deterministic_algorithms(True)
    try:
        again = sample(logits, uniforms, **settings)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(tokens, again[0])
    assert torch.equal(logprobs, again[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_grows_with_what_it_holds_and_keeps_it(monkeypatch, dtype):
    monkeypatch.setattr(decoding, "GROWTH", 8)
    policy = tiny_policy().to(dtype)
    growing, fixed = SlotDecoder(policy, 3, 40), SlotDecoder(policy, 3, 40)
    fixed._reserve(40)
    input_ids, lengths, rooms = np.random.default_rng(0).integers(3, VOCABULARY, (3, 40)), np.array([3, 6, 5]), []
    for _ in range(34):
        ours, theirs = (decoder.logits(input_ids, lengths) for decoder in (growing, fixed))
        torch.testing.assert_close(ours, theirs, rtol=1e-5 if dtype == torch.float32 else 0.1, atol=1e-4)
        rooms.append(growing.layers[0].keys.shape[2])
        lengths = lengths + 1
    assert rooms[0] == 8 and rooms[-1] == 40 and set(rooms) == {8, 16, 24, 32, 40}


def test_in_bfloat16_a_step_attends_to_keys_as_they_lie(monkeypatch):
    """A window of them would be copied before each product."""
    policy, dense = tiny_policy().bfloat16(), []
    real = SlotLayer.update

    def watched(self, *args, **kwargs):
        keys, values = real(self, *args, **kwargs)
        if self.window is not None:
            dense.append(keys.is_contiguous() and values.is_contiguous())
        return keys, values

    monkeypatch.setattr(SlotLayer, "update", watched)
    decoder = SlotDecoder(policy, 2, 30)
    for length in (4, 5, 6):
        decoder.logits(np.full((2, 30), 5), np.full(2, length))
    assert dense and all(dense)
