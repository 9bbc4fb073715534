import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lit_rlhf.engine import logprobs
from lit_rlhf.engine.logprobs import CHUNK_MOST, chunk_size, nll_sum, token_logprobs


@pytest.fixture
def problem():
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=True)
    return head, torch.randn(37, 16, requires_grad=True), torch.randint(50, (37,))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_softmax_at_the_sampling_temperature(problem, temperature):
    head, hidden, targets = problem
    logprobs, _ = token_logprobs(head, hidden, targets, temperature)
    expected = -nn.functional.cross_entropy(head(hidden) / temperature, targets, reduction="none")
    torch.testing.assert_close(logprobs, expected)


def test_entropy_is_that_of_the_whole_next_token_distribution(problem):
    head, hidden, targets = problem
    _, entropy = token_logprobs(head, hidden, targets, with_entropy=True)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=head(hidden)).entropy())


@pytest.mark.parametrize("rows", [1, 5, 36])
def test_chunks_change_neither_values_nor_gradients(problem, rows):
    head, hidden, targets = problem
    results = []
    for chunk_bytes in (2**30, rows * 4 * 50):
        head.zero_grad()
        hidden.grad = None
        logprobs, entropy = token_logprobs(head, hidden, targets, with_entropy=True, chunk_bytes=chunk_bytes)
        (logprobs.square().sum() + entropy.sum()).backward()
        results.append(
            (logprobs.detach(), entropy.detach(), hidden.grad, head.weight.grad.clone(), head.bias.grad.clone())
        )
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole)


@pytest.mark.parametrize(
    ("gigabytes", "megabytes"),
    [(2, 64), (16, 256), (4096, 512)],  # at least, a 64th of the memory, at most
)
def test_the_size_of_a_chunk_follows_from_the_memory_of_the_device(gigabytes, megabytes, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=gigabytes * 2**30))
    head = nn.Linear(4, 1024, device="meta")
    assert chunk_size(head, torch.device("cpu")) == megabytes * 2**20 // (4 * 1024)


def test_no_response_token_gives_no_logprob_but_a_graph(problem):
    head, hidden, targets = problem
    logprobs, _ = token_logprobs(head, hidden[:0], targets[:0])
    logprobs.sum().backward()
    assert logprobs.shape == (0,)
    for gradient in (hidden.grad, head.weight.grad, head.bias.grad):  # which the other ranks wait for
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_logprobs_of_a_bfloat16_head_are_float32(problem):
    head, hidden, targets = problem
    logprobs, _ = token_logprobs(head.bfloat16(), hidden.bfloat16(), targets)
    assert logprobs.dtype == torch.float32


@pytest.mark.parametrize("rows", [5, 100])
def test_the_summed_nll_has_the_gradient_of_the_logprobs(problem, rows):
    head, hidden, targets = problem
    results = []
    for loss in (
        lambda: -token_logprobs(head, hidden, targets)[0].sum(),
        lambda: nll_sum(head, hidden, targets, chunk_bytes=rows * 4 * 50),
    ):
        head.zero_grad()
        hidden.grad = None
        total = loss()
        (0.3 * total).backward()
        results.append((total.detach(), hidden.grad, head.weight.grad.clone(), head.bias.grad.clone()))
    for expected, summed in zip(*results, strict=True):
        torch.testing.assert_close(summed, expected)


def test_a_head_that_is_more_than_a_linear_layer_is_called_as_it_is(problem):
    head, hidden, targets = problem

    class Adapted(nn.Linear):  # as LoRA does
        def forward(self, x):
            return super().forward(x) + 0.1 * self.extra(x)

    adapted = Adapted(16, 50)
    adapted.load_state_dict(head.state_dict())
    adapted.extra = nn.Linear(16, 50)
    expected = torch.log_softmax(adapted(hidden), -1).gather(-1, targets[:, None])[:, 0]
    for chunk_bytes in (2**30, 5 * 4 * 50):
        torch.testing.assert_close(token_logprobs(adapted, hidden, targets, chunk_bytes=chunk_bytes)[0], expected)
        total = nll_sum(adapted, hidden, targets, chunk_bytes=chunk_bytes)
        torch.testing.assert_close(total, -expected.sum())
        total.backward()
        assert adapted.extra.weight.grad is not None


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
    monkeypatch.setattr(logprobs, "autocast_dtype", lambda device: multiplied)

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
def test_logprobs_with_and_without_a_gradient_are_the_same_bits_in_bfloat16(problem, rows):
    head, hidden, targets = problem
    with torch.autocast("cpu", torch.bfloat16):
        new, _ = token_logprobs(head, hidden, targets, 0.7, chunk_bytes=rows * 4 * 50)
        with torch.no_grad():
            old, _ = token_logprobs(head, hidden, targets, 0.7, chunk_bytes=rows * 4 * 50)
    assert torch.equal(new, old)  # so the first ratio of new to old policy is exactly 1


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


@pytest.mark.parametrize("kind", [nn.Linear, type("Adapted", (nn.Linear,), {})])  # the second is called as a module
@pytest.mark.parametrize("rows", [5, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 20.0])
def test_ids_without_a_token_count_in_nothing(problem, kind, rows, temperature):
    """Log-probs, entropies and gradients are those of a head without their rows, in the middle and at the end."""
    plain, hidden, targets = problem
    used = torch.tensor([i for i in range(50) if i != 7 and i < 44])
    unused = torch.tensor([7, 44, 45, 46, 47, 48, 49])
    padded, small = kind(16, 50), nn.Linear(16, 43)
    padded.load_state_dict(plain.state_dict())
    with torch.no_grad():
        padded.weight[unused], padded.bias[unused] = 3.0, 50.0  # likelier than all others
        small.weight.copy_(padded.weight[used]), small.bias.copy_(padded.bias[used])
    targets = targets % 43
    settings = {"temperature": temperature, "with_entropy": True, "chunk_bytes": rows * 4 * 50}
    results = []
    for head, ids, missing in ((small, targets, None), (padded, used[targets], unused)):
        hidden.grad = None
        logprobs, entropy = token_logprobs(head, hidden, ids, **settings, unused_ids=missing)
        (logprobs.square().sum() + 7 * entropy.sum()).backward()
        results.append([logprobs.detach(), entropy.detach(), hidden.grad, head.weight.grad, head.bias.grad])
    assert not results[1][3][unused].any() and not results[1][4][unused].any()
    results[1][3:] = [gradient[used] for gradient in results[1][3:]]
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [5, 100])
def test_the_summed_nll_leaves_out_ids_without_a_token_in_every_dtype(problem, rows, dtype):
    head, hidden, targets = problem
    head, leaf, targets = head.to(dtype), hidden.detach().to(dtype).requires_grad_(), targets % 40
    with torch.no_grad():
        head.bias[40:] = 50.0
    expected = nn.functional.cross_entropy(head(leaf)[:, :40].float(), targets, reduction="sum").item()
    total = nll_sum(head, leaf, targets, chunk_bytes=rows * 4 * 50, unused_ids=torch.arange(40, 50))
    total.backward()
    assert total.item() == pytest.approx(expected, rel=1e-2)
    assert leaf.grad.isfinite().all()
    assert not head.weight.grad[40:].any()
