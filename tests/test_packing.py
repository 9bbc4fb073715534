import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device

from lit_rlhf import packing
from lit_rlhf.packing import Example, pack, plan_buckets
from tests.tiny import ARCHITECTURES, plain_response_logprobs, random_examples, tiny_policy


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


def test_a_prompt_shared_by_two_responses_is_packed_once():
    #                       prompt     chosen  rejected
    batch = pack([Example(np.array([5, 6, 7]), (np.array([8]), np.array([9, 2])))])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 2]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 3, 4]
    assert batch.predictors.tolist() == [2, 2, 4]  # token 7 predicts both 8 and 9, then 9 predicts 2
    assert batch.target_ids.tolist() == [8, 9, 2]
    assert batch.sequence_ids.tolist() == [0, 1, 1]
    assert batch.last_nodes.tolist() == [3, 5]


def test_chosen_and_rejected_split_by_chunk():
    examples = [Example(np.array([3]), (np.array([10 + i]), np.array([20 + i]))) for i in range(3)]
    batch = pack(examples)
    chosen, rejected = batch.sum_by_sequence(batch.target_ids.float()).chunk(2)
    assert chosen.tolist() == [10, 11, 12]
    assert rejected.tolist() == [20, 21, 22]


def test_masked_response_tokens_are_read_by_attention_but_not_by_the_loss():
    prompt, response = np.array([5, 6]), np.array([7, 8, 9])
    mask = np.array([False, True, True])  # the loss skips 7
    policy = tiny_policy()
    masked, _ = policy(pack([Example(prompt, (response,), (mask,))]))
    full, _ = policy(pack([Example(prompt, (response,))]))
    torch.testing.assert_close(masked, full[1:])


def test_no_token_sees_a_neighbour_in_the_pack():
    policy = tiny_policy()
    first, second = random_examples(2, seed=3)
    alone, _ = policy(pack([first]))
    together = pack([first, second])
    beside, _ = policy(together)
    torch.testing.assert_close(beside[together.sequence_ids == 0], alone, rtol=1e-5, atol=1e-5)


def test_the_last_token_of_a_sequence_never_predicts_the_first_of_the_next():
    batch = pack(random_examples(6, responses=2))
    assert not set(batch.predictors.tolist()) & set(batch.last_nodes.tolist())


@pytest.mark.parametrize("seed", range(5))
def test_bucket_plan_is_the_cheapest_of_all_partitions(seed):
    lengths = np.random.default_rng(seed).integers(1, 30, 6).tolist()
    overhead = 150.0

    def cost(buckets):
        return sum(len(b) * max(lengths[i] for i in b) ** 2 + overhead for b in buckets)

    def partitions(items):
        if not items:
            yield []
            return
        head, *rest = items
        for partition in partitions(rest):
            yield [[head], *partition]
            for i, block in enumerate(partition):
                yield [*partition[:i], [head, *block], *partition[i + 1 :]]

    planned = plan_buckets(lengths, overhead)
    assert sorted(itertools.chain.from_iterable(planned)) == list(range(6))
    assert cost(planned) == min(cost(p) for p in partitions(list(range(6))))


def test_packing_refuses_what_it_cannot_place():
    with pytest.raises(ValueError, match="example 1 has an empty prompt or response"):
        pack([Example(np.array([3]), (np.array([4]),)), Example(np.array([3]), (np.array([], dtype=int),))])
    with pytest.raises(ValueError, match="example 1 has 2 responses, the first has 1"):
        pack([Example(np.array([3]), (np.array([4]),)), Example(np.array([3]), (np.array([4]), np.array([4])))])


def test_the_end_to_end_layout_lists_each_sequence_in_turn():
    batch = pack(
        [Example(np.array([5, 6]), (np.array([7]), np.array([8, 9]))), Example(np.array([3]), (np.array([4]),) * 2)]
    )
    nodes, bounds, longest, source = batch.layout.end_to_end
    rows = [batch.input_ids[nodes[start:end]].tolist() for start, end in itertools.pairwise(bounds.tolist())]
    assert sorted(rows) == [[3, 4], [3, 4], [5, 6, 7], [5, 6, 8, 9]]
    assert longest == 4
    assert bounds.dtype == torch.int32
    assert torch.equal(nodes[source], torch.arange(len(batch.input_ids)))


def test_the_padding_fraction_counts_cells_of_attention_without_a_token():
    batch = pack([Example(np.array([3]), (np.array([4]),)), Example(np.array([3]), (np.array([4, 5, 6]),))])
    assert len(batch.layout.buckets) == 1  # 2 + 4 tokens in a bucket of 2 x 4 cells
    assert batch.layout.padding_fraction() == 0.25


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
    monkeypatch.setattr(packing, "takes_variable_lengths", lambda q, v: True)
    monkeypatch.setattr(packing, "varlen_attn", stand_in)
    monkeypatch.setattr(packing, "VARLEN_SHARES_KEYS", shares_keys)
    end_to_end, _ = policy(batch)
    torch.testing.assert_close(end_to_end, in_buckets, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_variable_length_attention_on_cuda_equals_the_buckets(architecture, monkeypatch):
    policy = tiny_policy(architecture).cuda().bfloat16()
    batch = move_data_to_device(pack(random_examples(6, responses=2)), torch.device("cuda"))
    end_to_end, _ = policy(batch)
    monkeypatch.setattr(packing, "takes_variable_lengths", lambda q, v: False)
    in_buckets, _ = policy(batch)
    torch.testing.assert_close(end_to_end, in_buckets, rtol=0.05, atol=0.1)  # bfloat16 keeps eight bits


def test_under_autocast_the_kernel_meets_one_half_precision(monkeypatch):
    """Rotary embeddings are float32 there, and what they turn with them: flash attention would refuse the mixture."""
    met = []
    monkeypatch.setattr(packing, "takes_variable_lengths", lambda q, v: met.append(q.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        tiny_policy("llama")(pack(random_examples(3)))
    assert met == [torch.bfloat16] * 2  # in each layer


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
