import pytest
import torch
import torch.nn.functional as F

from lit_rlhf.engine import attention, blocked_attention, layout
from lit_rlhf.engine.blocked_attention import BLOCK, LONGEST, suits_blocked_attention
from lit_rlhf.engine.memory import shapes
from lit_rlhf.engine.packing import pack
from tests.tiny import random_examples, tiny_policy


def inputs(n, T, heads, kv_heads, D=16):
    """Queries, keys, values and what comes back from the outputs, in bfloat16."""
    torch.manual_seed(T)
    widths = (heads, kv_heads, kv_heads, heads)
    return [torch.randn(n, T, width, D).mul(1.5).bfloat16() for width in widths]


def numbers(function, tensors, dtype):
    """Outputs and gradients of queries, keys and values."""
    *leaves, grad = (x.to(dtype).detach() for x in tensors)
    leaves = [x.requires_grad_() for x in leaves]
    out = function(*leaves)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in leaves)]


def by_torch(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    return out.transpose(1, 2)


def by_blocks(q, k, v):
    return blocked_attention.blocked_attention(q, k, v, 0.3)


def error(found, exact):
    return ((found.float() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("T", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (3, 1)])
def test_outputs_and_gradients_are_as_near_to_exact_ones_as_those_of_torch(T, heads, kv_heads, monkeypatch):
    monkeypatch.setattr(blocked_attention, "AT_ONCE", 3 * BLOCK * BLOCK)  # several parts of the rows
    tensors = inputs(3, T, heads, kv_heads)
    exact = numbers(by_torch, tensors, torch.float32)
    ours, theirs = (numbers(function, tensors, torch.bfloat16) for function in (by_blocks, by_torch))
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == torch.bfloat16 and mine.shape == true.shape
        if true.norm() > 1e-3:  # gradients of queries and keys are 0 for a single token
            assert error(mine, true) < max(2 * error(other, true), 0.006)


def test_a_token_sees_none_that_is_newer():
    q, k, v, _ = inputs(2, 2 * BLOCK + 3, 4, 2)
    before = by_blocks(q, k, v)
    k[:, 70:], v[:, 70:] = 0.5, -0.5
    after = by_blocks(q, k, v)
    assert after[:, :70].equal(before[:, :70]) and not after[:, 70].equal(before[:, 70])


def test_what_was_planned_without_numbers_leaves_nothing_behind():
    q, k, v, _ = inputs(1, 37, 4, 2)
    with shapes():
        by_blocks(*(torch.empty_like(x) for x in (q, k, v)))
    found = by_blocks(q, k, v)
    assert error(found, by_torch(q.float(), k.float(), v.float())) < 0.006


def test_scores_are_in_float32_under_autocast_too():
    tensors = inputs(2, 40, 4, 2)
    plain = numbers(by_blocks, tensors, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        reduced = numbers(by_blocks, tensors, torch.bfloat16)
    assert all(a.equal(b) for a, b in zip(plain, reduced, strict=True))


def test_nothing_of_the_size_of_the_scores_is_kept_for_the_backward_pass():
    q, k, v, _ = inputs(2, 200, 4, 2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        by_blocks(q.requires_grad_(), k.requires_grad_(), v)
    assert max(kept) == q.numel()


def test_it_is_for_bfloat16_and_lengths_at_which_it_is_faster(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    q, _, v, _ = inputs(1, 4, 2, 1)
    assert suits_blocked_attention(q, v, LONGEST)
    assert not suits_blocked_attention(q.float(), v.float(), 4)
    assert not suits_blocked_attention(q[..., :8], v, 4)  # values of another width
    assert not suits_blocked_attention(q, v, LONGEST + 1)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not suits_blocked_attention(q, v, 4)


@pytest.mark.parametrize(
    ("dtype", "cost", "once"), [("float32", 0.8, True), ("bfloat16", 0.8, False), ("bfloat16", 0.5, True)]
)
def test_in_bfloat16_prompts_are_attended_once_where_that_saves_more_than_it_loses(monkeypatch, dtype, cost, once):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(layout, "SHARED_GAIN", float("inf"))
    policy, calls = tiny_policy().to(getattr(torch, dtype)), []
    packed = pack(random_examples(3, responses=2))
    packed = packed._replace(layout=packed.layout._replace(shared=packed.layout.shared._replace(cost=cost)))
    real = attention.shared_attention
    monkeypatch.setattr(attention, "shared_attention", lambda *args: calls.append(args) or real(*args))
    policy(packed)
    assert bool(calls) is once


def test_a_window_that_rules_out_blocks_has_prompts_attended_once(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(layout, "SHARED_GAIN", float("inf"))
    shared = pack(random_examples(3, responses=2)).layout.shared._replace(cost=0.8)
    q, _, v, _ = inputs(1, 4, 2, 1)
    chosen = [attention.shared_is_faster(shared, q, v, window, None) for window in (None, shared.longest, 2)]
    assert chosen == [False, False, True]


def test_packed_rows_in_bfloat16_go_through_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    policy, calls = tiny_policy().bfloat16(), []
    real = attention.blocked_attention
    monkeypatch.setattr(attention, "blocked_attention", lambda *args: calls.append(args) or real(*args))
    policy(pack(random_examples(3)))
    assert len(calls) >= policy.model.config.num_hidden_layers
