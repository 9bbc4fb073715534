import pytest
import torch
from torch import nn

from lit_rlhf.logprobs import token_logprobs


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


def test_logits_of_one_chunk_at_most_are_held_for_the_backward_pass(problem):
    head, hidden, targets = problem
    held = []

    def record(tensor):
        held.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        token_logprobs(head, hidden, targets, chunk_bytes=5 * 4 * 50)
    assert not any(len(shape) == 2 and shape[-1] == 50 for shape in held)


def test_no_response_token_gives_no_logprob_but_a_graph(problem):
    head, hidden, targets = problem
    logprobs, _ = token_logprobs(head, hidden[:0], targets[:0])
    logprobs.sum().backward()
    assert logprobs.shape == (0,)
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_logprobs_of_a_bfloat16_head_are_float32(problem):
    head, hidden, targets = problem
    logprobs, _ = token_logprobs(head.bfloat16(), hidden.bfloat16(), targets)
    assert logprobs.dtype == torch.float32
