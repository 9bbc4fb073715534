"""Divergences of next-token distributions, against the sums of their definitions and their limits."""

import math

import pytest
import torch

from lit_rlhf.errors import UserError
from lit_rlhf.losses import forward_kl, generalized_jensen_shannon, reverse_kl

TEACHER = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]).double()
STUDENT = torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.5, 0.0]]).double()


def logs(p):
    return p.clamp(min=1e-300).log()


def test_by_hand():
    # ½ log 2 + ¼ log ½ = ¼ log 2; 1 log 2
    assert forward_kl(logs(TEACHER), logs(STUDENT)).tolist() == pytest.approx([0.25 * math.log(2), math.log(2)])
    assert reverse_kl(logs(STUDENT), logs(TEACHER)).tolist() == pytest.approx([0.25 * math.log(2), math.log(2)])
    # m = (⅜, ⅜, ¼) of the first: ½ (½ log 4/3 + ¼ log ⅔) twice, by symmetry
    expected = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)
    assert generalized_jensen_shannon(logs(TEACHER), logs(STUDENT))[0].item() == pytest.approx(expected)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, generalized_jensen_shannon])
def test_it_is_least_where_student_and_teacher_agree_and_ids_without_a_token_add_nothing(divergence):
    teacher, student = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    teacher[:, 3] = student[:, 3] = -1e30
    student = student.log_softmax(-1).requires_grad_()
    teacher = teacher.log_softmax(-1)
    assert (divergence(teacher, student) > 0).all()
    divergence(teacher, student).sum().backward()
    assert student.grad.isfinite().all()
    assert divergence(teacher, teacher).abs().max() < 1e-12


def test_jensen_shannon_goes_to_the_two_kls_and_is_bounded():
    p, q = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1)).double().log_softmax(-1)
    small = 1e-6
    torch.testing.assert_close(generalized_jensen_shannon(p, q, small) / small, forward_kl(p, q), rtol=1e-4, atol=0)
    torch.testing.assert_close(generalized_jensen_shannon(p, q, 1 - small) / small, reverse_kl(p, q), rtol=1e-4, atol=0)
    apart = logs(torch.eye(2).double())
    assert generalized_jensen_shannon(apart, apart.flip(0)).tolist() == pytest.approx([math.log(2)] * 2)
    with pytest.raises(UserError, match=r"teacher_share \(1\.0\) must be between 0 and 1; at the ends take forward_kl"):
        generalized_jensen_shannon(p, q, 1.0)
