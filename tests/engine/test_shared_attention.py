import itertools

import numpy as np
import pytest
import torch

from lit_rlhf.engine import layout, shared_attention
from lit_rlhf.engine.packing import Example, pack
from tests.tiny import ARCHITECTURES, VOCABULARY, plain_response_logprobs, tiny_policy

# Of a prompt and its responses. Three prompts share a bucket; windows of 5 end in prompts, at their end and past it.
GROUPS = ((20, (1, 4, 9)), (19, (2, 9, 3)), (18, (1, 1, 1)), (1, (8, 12, 2)), (6, (1, 3, 1)))


@pytest.fixture
def always_shared(monkeypatch):
    monkeypatch.setattr(layout, "SHARED_GAIN", float("inf"))  # whatever it costs


def random_groups(sizes, responses=None, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Example(
            rng.integers(3, VOCABULARY, prompt),
            tuple(rng.integers(3, VOCABULARY, tokens) for tokens in (own * 16)[: responses or len(own)]),
        )
        for prompt, own in sizes
    ]


@pytest.mark.parametrize("responses", [2, 8, 16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_and_gradients_of_groups_equal_those_of_separate_rows(architecture, responses, always_shared):
    policy, examples = tiny_policy(architecture), random_groups(GROUPS[::2], responses)
    batch = pack(examples)
    assert batch.layout.shared is not None

    def gradients(logprobs):
        policy.zero_grad()
        logprobs.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters()])

    packed = batch.sum_by_sequence(policy(batch)[0])
    rows = [(example.prompt_ids, example.responses[k]) for k in range(responses) for example in examples]
    separate = torch.stack([plain_response_logprobs(policy.model, *row).sum() for row in rows])
    torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-4)
    ours, theirs = gradients(packed), gradients(separate)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def plain(q, k, v, examples, scaling, window, softcap):
    """Attention of each sequence by itself, each by its softmax: (N, H, D) outputs, from the last that has the node."""
    out, start = {}, 0
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    for example in examples:
        prompt = torch.arange(start, start + len(example.prompt_ids))
        start += len(prompt)
        for response in example.responses:
            nodes = torch.cat([prompt, torch.arange(start, start + len(response))])
            start += len(response)
            scores = torch.einsum("qhd,khd->hqk", q[nodes], k[nodes]) * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            distance = torch.arange(len(nodes))[:, None] - torch.arange(len(nodes))
            hidden = (distance < 0) | (distance >= (window or len(nodes)))
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            out |= zip(nodes.tolist(), torch.einsum("hqk,khd->qhd", weights, v[nodes]), strict=True)
    return torch.stack([out[node] for node in range(start)])


def tables(num_nodes, heads, width, dtype=torch.float64, seed=0):
    """Queries, keys and values, and what comes back for the outputs."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (heads[0], 8), (heads[1], 8), (heads[1], width), (heads[0], width)
    values = [torch.randn(num_nodes, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
    return [x.requires_grad_() for x in values[:3]], values[3]


def results(function, tensors, upstream):
    for x in tensors:
        x.grad = None
    out = function(*tensors)
    out.backward(upstream)
    return [out.detach(), *(x.grad for x in tensors)]


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 3, 6, 20, 100])
@pytest.mark.parametrize(("heads", "width"), [((4, 4), 8), ((6, 2), 8), ((4, 1), 5)])
def test_values_and_gradients_are_exact(heads, width, window, softcap, always_shared):
    """In double precision nothing is left to rounding; capped scores are weighed in single precision."""
    examples = random_groups(GROUPS)
    batch = pack(examples)
    tensors, upstream = tables(len(batch.input_ids), heads, width)

    def ours(*qkv):
        return shared_attention.shared_attention(*qkv, batch.layout.shared, 0.3, window, softcap)

    def theirs(*qkv):
        return plain(*qkv, examples, 0.3, window, softcap)

    for once, apart in zip(results(ours, tensors, upstream), results(theirs, tensors, upstream), strict=True):
        assert (once - apart).norm() < (1e-13 if softcap is None else 1e-6) * apart.norm()


def test_in_bfloat16_it_rounds_no_worse_than_a_kernel_does_over_whole_sequences(always_shared):
    examples = random_groups(GROUPS)
    batch = pack(examples)
    exact = results(lambda *qkv: plain(*qkv, examples, 0.3, None, None), *tables(len(batch.input_ids), (4, 2), 8))
    half = tables(len(batch.input_ids), (4, 2), 8, torch.bfloat16)

    def once(*qkv):
        return shared_attention.shared_attention(*qkv, batch.layout.shared, 0.3)

    def whole(q, k, v):
        outputs = []
        for cells in batch.layout.buckets:
            heads = (x[cells].transpose(1, 2) for x in (q, k, v))
            out = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, scale=0.3, enable_gqa=True)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)[batch.layout.source]

    for ours, theirs, true in zip(results(once, *half), results(whole, *half), exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert 0 < (ours - true).norm() < 1.2 * (theirs - true).norm()


def test_what_stands_in_cells_past_an_end_changes_nothing(always_shared):
    """Its scores would overflow: exp(1000 - lse) of the node that stands there."""
    examples = random_groups(GROUPS)
    batch = pack(examples)
    tensors, upstream = tables(len(batch.input_ids), (4, 2), 8, torch.float32)
    with torch.no_grad():
        tensors[0][0] *= 1000
    found = results(lambda *qkv: shared_attention.shared_attention(*qkv, batch.layout.shared, 0.3), tensors, upstream)
    exact = results(lambda *qkv: plain(*qkv, examples, 0.3, None, None), tensors, upstream)
    for once, apart in zip(found, exact, strict=True):
        torch.testing.assert_close(once, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("responses", [2, 8, 16])
def test_one_more_response_meets_the_prompt_which_is_not_attended_anew(responses, always_shared, monkeypatch):
    met = {"forward": 0, "backward": 0}

    def counting(kernel, phase, first):
        def call(*args, **kwargs):
            queries, keys = args[first], args[first + 1]
            met[phase] += queries.shape[0] * queries.shape[2] * keys.shape[2]
            return kernel(*args, **kwargs)

        return call

    monkeypatch.setattr(shared_attention, "FLASH", counting(shared_attention.FLASH, "forward", 0))
    monkeypatch.setattr(shared_attention, "FLASH_BACKWARD", counting(shared_attention.FLASH_BACKWARD, "backward", 1))
    batch = pack(random_groups([(200, (10,))], responses))
    tensors, upstream = tables(len(batch.input_ids), (1, 1), 8)
    results(lambda *qkv: shared_attention.shared_attention(*qkv, batch.layout.shared, 0.3), tensors, upstream)
    pairs = 200 * 200 + responses * 10 * (10 + 200)
    assert met == {"forward": pairs, "backward": pairs}


def test_nodes_alone_are_held_for_the_backward_pass(always_shared):
    """No cell of a bucket is, nor keys for each query head."""
    batch = pack(random_groups(GROUPS))
    (q, k, v), _ = tables(len(batch.input_ids), (6, 2), 8)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x) or x, lambda x: x):
        out = shared_attention.shared_attention(q, k, v, batch.layout.shared, 0.3)
    assert sum(x.numel() for x in held if x.is_floating_point()) == sum(
        (q.numel(), k.numel(), v.numel(), out.numel(), out.shape[0] * out.shape[1])
    )


def test_blocks_that_are_computed_twice_give_the_same_to_the_bit(always_shared):
    batch = pack(random_groups(GROUPS))

    def gradients(twice):
        policy = tiny_policy().train()
        if twice:
            policy.checkpoint_activations()
        policy(batch)[0].square().sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters()])

    assert torch.equal(gradients(True), gradients(False))


def test_a_mask_of_answers_hides_the_ends_of_shorter_prompts_and_what_a_window_has_left_behind(always_shared):
    (answers,) = pack(random_groups(((4, (2, 1)), (3, (1, 1))))).layout.shared.answers
    order = answers.lengths.tolist()
    assert shared_attention.seen(answers, None)[order.index(3), 0].tolist() == [[True, True, True, False]]
    # Queries at 4, 5 and 4 see the two tokens before them, as far as these are the prompt's.
    assert shared_attention.seen(answers, 3)[order.index(4), 0].tolist() == [
        [False, False, True, True],
        [False, False, False, True],
        [False, False, True, True],
    ]
    (alone,) = pack(random_groups(((4, (2, 1)),))).layout.shared.answers
    assert shared_attention.seen(alone, None) is None


def test_a_band_is_a_causal_mask_of_the_newest_tokens():
    assert shared_attention.band(5, 5, torch.device("cpu")) is None
    assert shared_attention.band(3, 2, torch.device("cpu")).tolist() == [
        [True, False, False],
        [True, True, False],
        [False, True, True],
    ]


def test_rows_of_a_table_go_into_buckets_and_back():
    table = torch.randn(5 * 2, 3, 4)  # five nodes, two heads of keys
    nodes = torch.tensor([[4, 0], [2, 1]])
    rows = torch.cat([nodes * 2, nodes * 2 + 1])
    taken = shared_attention.take(table, rows)
    assert taken.shape == (4, 3, 2, 4)
    back = shared_attention.laid([taken], 2)
    expected = [table[node * 2 + head] for head, node in itertools.product(range(2), (4, 0, 2, 1))]
    assert torch.equal(back, torch.stack(expected))
