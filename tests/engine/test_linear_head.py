"""A plain linear head, by `token_logprobs` and `nll_sum`, which hand it here."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lit_rlhf.engine import linear_head
from lit_rlhf.engine.logprobs import CHUNK_MOST, nll_sum, token_logprobs
from lit_rlhf.engine.memory import planned_for


@pytest.mark.parametrize("rows", [5, 100])
def test_gradients_in_bfloat16_stay_within_its_rounding(problem, rows):
    head, hidden, targets = problem
    weights = torch.rand(37)
    gradients = []
    for enabled in (False, True):
        hidden.grad = None
        head.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logprobs, entropy = token_logprobs(head, hidden, targets, 0.7, with_entropy=True, chunk_bytes=rows * 4 * 50)
        (logprobs * weights + 0.1 * entropy).sum().backward()
        gradients.append((hidden.grad, head.weight.grad.clone(), head.bias.grad.clone()))
    for exact, rounded in zip(*gradients, strict=True):
        assert rounded.dtype == torch.float32
        assert (rounded - exact).norm() / exact.norm() < 0.02  # bfloat16 keeps eight bits


def test_a_plan_for_a_gpu_works_on_as_many_rows_as_the_gpu_will():
    logits = torch.empty(64, 2**18, device="meta")  # a MB a row
    counts = []
    for kind in ("cpu", "cuda"):
        with planned_for(kind, memory=10**9):
            counts.append(len(linear_head.blocks(logits)))
    assert counts == [32, 1]


def test_the_scale_of_the_summed_nll_is_not_rounded_to_bfloat16(problem):
    head, hidden, targets = problem
    head, gradients = head.bfloat16(), []
    for scale in (1.0, 1 / 1027):  # 0.23 % beside the nearest number of eight bits
        leaf = hidden.detach().bfloat16().requires_grad_()
        (scale * nll_sum(head, leaf, targets, chunk_bytes=5 * 4 * 50)).backward()
        gradients.append(leaf.grad.float())
    assert (1027 * gradients[1]).norm() / gradients[0].norm() == pytest.approx(1, abs=5e-4)


def test_a_near_certain_token_keeps_its_small_gradient_in_bfloat16():
    head = nn.Linear(2, 2, bias=False).bfloat16()
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[3.0, 0.0], [-4.0, 0.0]]))
    hidden = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    token_logprobs(head, hidden, torch.tensor([0]))[0].sum().backward()
    p = torch.sigmoid(torch.tensor(-7.0))  # of the other token; rounded to eight bits, 1 - p would be 1
    torch.testing.assert_close(hidden.grad[0, 0].float(), 7 * p, rtol=0.02, atol=0)


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors that are alive; on the meta device nothing is really allocated."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.release, storage.nbytes())
        return result

    def release(self, size):
        self.live -= size


def test_logits_of_one_chunk_at_most_are_held_for_the_backward_pass(problem):
    def held(chunk_bytes):
        with PeakMemory() as memory:
            results = token_logprobs(*problem, chunk_bytes=chunk_bytes)
        assert results[0].requires_grad
        return memory.live

    # One chunk is kept, and becomes its own gradient; of several none is, since they are made anew.
    assert held(2**30) - held(5 * 4 * 50) == 37 * 4 * 50


@pytest.mark.parametrize("width", [1024, 3584])  # beyond, the gradient of the head's weight is most of an eighth
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")])
@pytest.mark.parametrize("way", [token_logprobs, nll_sum])
def test_the_loss_at_16k_tokens_and_a_vocabulary_of_150k_takes_an_eighth_of_the_plain_memory(
    dtypes, way, width, monkeypatch
):
    """In single, half and mixed precision; the last as autocast does it, which the meta device does not know."""
    stored, multiplied = (getattr(torch, name) for name in dtypes)
    monkeypatch.setattr(linear_head, "autocast_dtype", lambda device: multiplied)

    def plain(head, hidden, targets):
        logits = F.linear(hidden.to(multiplied), head.weight.to(multiplied))
        return torch.log_softmax(logits.float(), -1).gather(-1, targets[:, None])

    def peak(function, **options):
        head = nn.Linear(width, 150_000, bias=False, device="meta", dtype=stored)
        hidden = torch.empty(16_384, width, device="meta", dtype=stored, requires_grad=True)
        targets = torch.empty(16_384, device="meta", dtype=torch.int64)
        with PeakMemory() as memory:
            head.weight.detach(), hidden.detach()  # seen
            before = memory.live
            result = function(head, hidden, targets, **options)
            (result[0] if isinstance(result, tuple) else result).sum().backward()
        return memory.peak - before

    # With the largest chunks that any device gets.
    assert peak(way, chunk_bytes=CHUNK_MOST) <= peak(plain) / 8


class Products(TorchDispatchMode):
    """Records the dtypes of matrix products, and how often a weight is converted."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.dtypes, self.conversions = weight, set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].data_ptr() == self.weight.data_ptr():
            self.conversions += 1
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.dtypes |= {arg.dtype for arg in args if isinstance(arg, torch.Tensor) and arg.ndim == 2}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", [token_logprobs, nll_sum])
def test_the_head_is_converted_once_for_all_chunks_and_multiplied_in_the_compute_dtype(problem, way):
    head, hidden, targets = problem
    with Products(head.weight) as products, torch.autocast("cpu", torch.bfloat16):
        result = way(head, hidden, targets, chunk_bytes=5 * 4 * 50)  # eight chunks
    assert products.dtypes == {torch.bfloat16}
    assert products.conversions == 1
    (result[0] if isinstance(result, tuple) else result).sum().backward()
    assert head.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("rows", [5, 100])
def test_gradients_are_those_of_autograd_through_the_whole_softmax(problem, rows):
    head, hidden, targets = problem
    weights, temperature = torch.rand(37), 0.7

    def plain():
        logprobs = torch.log_softmax(head(hidden) / temperature, -1)
        return logprobs.gather(-1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)

    def ours():
        return token_logprobs(head, hidden, targets, temperature, with_entropy=True, chunk_bytes=rows * 4 * 50)

    gradients = []
    for way in (plain, ours):
        hidden.grad = None
        head.zero_grad()
        logprobs, entropy = way()
        (logprobs * weights + entropy * weights.flip(0)).sum().backward()
        gradients.append((hidden.grad, head.weight.grad.clone(), head.bias.grad.clone()))
    for expected, gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected)
