import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device

from lit_rlhf.engine import attention, layout
from lit_rlhf.engine.memory import planned_for, shapes
from lit_rlhf.engine.packing import Example, pack
from tests.tiny import ARCHITECTURES, VOCABULARY, plain_response_logprobs, random_examples, tiny_policy

SIZES = (((20, 21), (1, 4)), ((30, 40), (2, 9)), ((1, 3), (8, 12)), ((6, 9), (1, 3)))  # of prompts and responses


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_logprobs_and_gradients_equal_separate_forwards(architecture):
    policy = tiny_policy(architecture)
    examples = random_examples(5, responses=2)
    batch = pack(examples)

    packed = batch.sum_by_sequence(policy(batch)[0])
    packed.square().sum().backward()
    packed_gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    separate = torch.stack(
        [
            plain_response_logprobs(policy.model, example.prompt_ids, example.responses[k]).sum()
            for k in range(2)
            for example in examples
        ]
    )
    separate.square().sum().backward()

    torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-4)
    for name, parameter in policy.named_parameters():
        difference = (packed_gradients[name] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-8)
        assert difference < 1e-5, name


@pytest.mark.parametrize("responses", [2, 5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prompts_that_are_attended_once_give_the_numbers_of_whole_sequences(architecture, responses, monkeypatch):
    policy, rng = tiny_policy(architecture), np.random.default_rng(0)

    def ids(shortest, longest):
        return rng.integers(3, VOCABULARY, rng.integers(shortest, longest))

    # Sliding windows end within prompts, at their end and within responses; one example stays whole.
    examples = [Example(ids(*p), tuple(ids(*r) for _ in range(responses))) for p, r in SIZES]

    def results(gain):
        monkeypatch.setattr(layout, "SHARED_GAIN", gain)
        batch = pack(examples)
        assert (batch.layout.shared is not None) is (gain > 1)
        policy.zero_grad()
        logprobs, entropy = policy(batch, with_entropy=True)
        (batch.sum_by_sequence(logprobs).square().sum() + entropy.sum()).backward()
        return logprobs.detach(), entropy.detach(), torch.cat([p.grad.flatten() for p in policy.parameters()])

    for once, whole in zip(results(float("inf")), results(0), strict=True):
        assert (once - whole).norm() < 1e-6 * whole.norm()


def test_no_token_sees_a_neighbour_in_the_pack():
    policy = tiny_policy()
    first, second = random_examples(2, seed=3)
    alone, _ = policy(pack([first]))
    together = pack([first, second])
    beside, _ = policy(together)
    torch.testing.assert_close(beside[together.sequence_ids == 0], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shares_keys", [True, False])  # torch 2.12, torch 2.11
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_variable_length_attention_equals_the_buckets(architecture, shares_keys, monkeypatch):
    """The call of the CUDA kernel, with a slow stand-in of it that follows its documentation."""

    def stand_in(q, k, v, bounds_q, bounds_k, longest_q, longest_k, *, scale, window_size, enable_gqa=False):
        assert longest_q == longest_k == int(bounds_q.diff().max())
        assert enable_gqa is shares_keys and (shares_keys or q.shape == k.shape == v.shape)
        outputs = []
        for start, end in itertools.pairwise(bounds_q.tolist()):
            distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
            left, right = window_size
            mask = (distance >= -right) & ((distance <= left) if left >= 0 else True)
            heads = (x[start:end].transpose(0, 1) for x in (q, k, v))
            out = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
            outputs.append(out.transpose(0, 1))
        return torch.cat(outputs)

    policy, batch = tiny_policy(architecture), pack(random_examples(6, responses=2))
    in_buckets, _ = policy(batch)
    monkeypatch.setattr(attention, "takes_variable_lengths", lambda q, v: True)
    monkeypatch.setattr(attention, "varlen_attn", stand_in)
    monkeypatch.setattr(attention, "VARLEN_SHARES_KEYS", shares_keys)
    end_to_end, _ = policy(batch)
    torch.testing.assert_close(end_to_end, in_buckets, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_variable_length_attention_on_cuda_equals_the_buckets(architecture, monkeypatch):
    policy = tiny_policy(architecture).cuda().bfloat16()
    batch = move_data_to_device(pack(random_examples(6, responses=2)), torch.device("cuda"))
    end_to_end, _ = policy(batch)
    monkeypatch.setattr(attention, "takes_variable_lengths", lambda q, v: False)
    in_buckets, _ = policy(batch)
    torch.testing.assert_close(end_to_end, in_buckets, rtol=0.05, atol=0.1)  # bfloat16 keeps eight bits


def test_under_autocast_the_kernel_meets_one_half_precision(monkeypatch):
    """Rotary embeddings are float32 there, and what they turn with them: flash attention would refuse the mixture."""
    met = []
    monkeypatch.setattr(attention, "takes_variable_lengths", lambda q, v: met.append(q.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        tiny_policy("llama")(pack(random_examples(3)))
    assert met == [torch.bfloat16] * 2  # in each layer


def test_what_is_planned_for_a_gpu_takes_the_kernel_of_gpus():
    with shapes():
        rows = torch.ones(5, 2, 8, dtype=torch.bfloat16)
    for kind in ("cuda", "cpu"):
        with planned_for(kind, memory=10**9):
            assert attention.takes_variable_lengths(rows, rows) == (kind == "cuda")
            assert not attention.takes_variable_lengths(rows.float(), rows.float())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_bfloat16_packed_logprobs_and_gradients_are_as_near_to_exact_ones_as_separate_forwards(architecture):
    """Both round; packing must not round worse, in any value or in the gradient of any weight."""
    policy, examples = tiny_policy(architecture), random_examples(5, responses=2)
    batch = pack(examples)

    def packed():
        return policy(batch)[0]

    def separate():
        order = [(example, k) for k in range(2) for example in examples]
        return torch.cat([plain_response_logprobs(policy.model, e.prompt_ids, e.responses[k]) for e, k in order])

    def results(way, enabled):
        policy.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logprobs = way()
        assert logprobs.dtype == torch.float32
        logprobs.sum().backward()
        return logprobs.detach(), torch.cat([p.grad.flatten() for p in policy.parameters()])

    exact = results(separate, False)
    errors = [
        [(ours - true).norm() / true.norm() for ours, true in zip(results(way, True), exact, strict=True)]
        for way in (packed, separate)
    ]
    for ours, plain in zip(*errors, strict=True):
        assert 0 < ours < 1.5 * plain
