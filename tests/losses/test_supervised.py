import math

import pytest
import torch

from lit_rlhf.losses import nll, process_reward_loss


class TestSupervised:
    def test_nll_of_a_uniform_policy_over_four_tokens_is_log_4(self):
        logprobs = torch.log_softmax(torch.zeros(5, 4), dim=-1)[:, 0]
        assert torch.allclose(nll(logprobs), torch.full((5,), math.log(4)))

    def test_process_reward_loss_is_the_surprise_at_the_label(self):
        # σ(1) = 0.731059: -log of it is 0.313262 where the step is right, -log 0.268941 = 1.313262 where it is wrong,
        # and a fourth of the one with three of the other where one in four judges says right: 1.063262
        scores, labels = torch.ones(3), torch.tensor([1.0, 0.0, 0.25])
        expected = torch.tensor([0.313262, 1.313262, 1.063262])
        torch.testing.assert_close(process_reward_loss(scores, labels), expected, atol=1e-6, rtol=0)

    def test_process_reward_loss_is_least_where_the_score_says_the_label(self):
        scores = torch.tensor([0.25]).logit().requires_grad_()
        loss = process_reward_loss(scores, torch.tensor([0.25]))
        loss.sum().backward()
        assert loss.item() == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
        assert scores.grad.item() == pytest.approx(0, abs=1e-7)
