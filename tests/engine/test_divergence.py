"""Divergences chunk by chunk, against whole (M, V) tensors and autograd."""

import pytest
import torch
from torch import nn

from lit_rlhf.engine.divergence import Predictions, divergences, learning
from lit_rlhf.losses import forward_kl, generalized_jensen_shannon, reverse_kl

M, V = 11, 23


def predictions(width, vocabulary, seed, bias=False, unused=None):
    torch.manual_seed(seed)
    hidden = torch.randn(M, width, requires_grad=True)
    return Predictions(nn.Linear(width, vocabulary, bias=bias), hidden, unused)


def slow(student, teacher, divergence, temperature, weights, width):
    """Without chunks, and sums of the definition in float64."""
    values = []
    for i in range(M):
        rows = []
        for part in (teacher, student):
            z = (part.hidden[i].double() @ part.head.weight.double().t())[:width] / temperature
            z = z if part.head.bias is None else z + part.head.bias.double()[:width] / temperature
            kept = [v for v in range(width) if part.unused_ids is None or v not in part.unused_ids]
            rows.append(z[kept] - z[kept].exp().sum().log())
        t, s = rows[0].detach(), rows[1]
        m = ((t.exp() + s.exp()) / 2).log()
        pieces = {
            forward_kl: (t.exp() * (t - s)).sum(),
            reverse_kl: (s.exp() * (s - t)).sum(),
            generalized_jensen_shannon: 0.5 * (t.exp() * (t - m)).sum() + 0.5 * (s.exp() * (s - m)).sum(),
        }
        values.append(pieces[divergence] * weights[i].double())
    return torch.stack(values)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, generalized_jensen_shannon])
@pytest.mark.parametrize("chunk_bytes", [4 * V * 3, None])  # three tokens at a time, or all
@pytest.mark.parametrize(("temperature", "bias", "unused"), [(1.0, False, None), (0.7, True, torch.tensor([3, 19]))])
def test_values_and_gradients_are_those_of_whole_tensors(divergence, chunk_bytes, temperature, bias, unused):
    student, teacher = predictions(8, V, 0, bias, unused), predictions(12, V, 1, bias, unused)
    weights = torch.rand(M)
    values, gradients = divergences(student, teacher, divergence, temperature, weights, chunk_bytes)
    expected = slow(student, teacher, divergence, temperature, weights, V)
    torch.testing.assert_close(values.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    by = learning(student)
    assert len(by) == (3 if bias else 2)
    for gradient, whole in zip(gradients, torch.autograd.grad(expected.sum(), by), strict=True):
        torch.testing.assert_close(gradient, whole, rtol=1e-5, atol=1e-5)


def test_ids_that_one_of_the_two_has_beyond_the_other_are_left_out():
    """As of two models of one tokenizer whose logits are padded to other widths."""
    beyond = torch.arange(V, V + 5)
    student, teacher = predictions(8, V, 0), predictions(12, V + 5, 1, unused=beyond)
    narrow = Predictions(nn.Linear(12, V, bias=False), teacher.hidden)
    narrow.head.weight.data.copy_(teacher.head.weight.data[:V])
    values, _ = divergences(student, teacher, forward_kl)
    torch.testing.assert_close(values, divergences(student, narrow, forward_kl)[0])


def test_without_gradients_none_is_made_and_no_tokens_give_nothing():
    student, teacher = predictions(8, V, 0), predictions(12, V, 1)
    with torch.no_grad():
        assert divergences(student, teacher, forward_kl)[1] == []
    none = student._replace(hidden=student.hidden[:0]), teacher._replace(hidden=teacher.hidden[:0])
    values, gradients = divergences(*none, forward_kl)
    assert len(values) == 0 and gradients == [None, None]


def test_no_more_than_a_chunk_of_logits_is_there_at_a_time():
    """The widest tensor that a divergence is given."""
    seen = []

    def watched(teacher_logprobs, logprobs):
        seen.append((teacher_logprobs.shape, logprobs.shape))
        return forward_kl(teacher_logprobs, logprobs)

    divergences(predictions(8, V, 0), predictions(12, V, 1), watched, chunk_bytes=4 * V * 4)
    assert seen == [((n, V), (n, V)) for n in (4, 4, 3)]
