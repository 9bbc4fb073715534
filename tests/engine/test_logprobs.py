from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lit_rlhf.engine.logprobs import chunk_size, nll_sum, token_logprobs


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
def test_logprobs_with_and_without_a_gradient_are_the_same_bits_in_bfloat16(problem, rows):
    head, hidden, targets = problem
    with torch.autocast("cpu", torch.bfloat16):
        new, _ = token_logprobs(head, hidden, targets, 0.7, chunk_bytes=rows * 4 * 50)
        with torch.no_grad():
            old, _ = token_logprobs(head, hidden, targets, 0.7, chunk_bytes=rows * 4 * 50)
    assert torch.equal(new, old)  # so the first ratio of new to old policy is exactly 1


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
