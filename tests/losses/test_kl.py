import pytest
import torch

from lit_rlhf.losses.kl import clamped_logratio, k1, k2, k3, sequence_k2, sequence_sums, with_k2_gradient

# A categorical policy and reference over 8 tokens; expectations below are sums over all tokens, no sampling.
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(8, generator=GENERATOR, dtype=torch.float64)
REF_LOGPROBS = torch.log_softmax(torch.randn(8, generator=GENERATOR, dtype=torch.float64), dim=0)
LOGPROBS = torch.log_softmax(LOGITS, dim=0)
P = LOGPROBS.exp()
OTHER_LOGITS = torch.randn(8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def exact_kl(logprobs, ref_logprobs):
    return torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=logprobs), torch.distributions.Categorical(logits=ref_logprobs)
    )


def mean_and_variance(estimator, logprobs=LOGPROBS, ref_logprobs=REF_LOGPROBS):
    values, p = estimator(logprobs, ref_logprobs), logprobs.exp()
    mean = (p * values).sum()
    return mean.item(), (p * (values - mean).square()).sum().item()


def mean_gradient(estimate):
    """E_π[∇ estimate] over the logits, the samples' distribution held fixed."""
    logits = LOGITS.clone().requires_grad_()
    values = estimate(torch.log_softmax(logits, dim=0), REF_LOGPROBS)
    (gradient,) = torch.autograd.grad((P * values).sum(), logits)
    return gradient


def exact_gradient(divergence):
    logits = LOGITS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(divergence(torch.log_softmax(logits, dim=0)), logits)
    return gradient


class TestEstimators:
    @pytest.mark.parametrize("estimator", [k1, k2, k3])
    def test_it_is_zero_where_policy_and_reference_agree(self, estimator):
        assert torch.equal(estimator(LOGPROBS, LOGPROBS), torch.zeros(8, dtype=torch.float64))

    @pytest.mark.parametrize("estimator", [k1, k3])
    def test_its_expectation_is_the_exact_kl(self, estimator):
        assert mean_and_variance(estimator)[0] == pytest.approx(exact_kl(LOGPROBS, REF_LOGPROBS).item())

    def test_k2_is_biased_but_agrees_with_kl_to_second_order(self):
        kl = exact_kl(LOGPROBS, REF_LOGPROBS).item()
        assert mean_and_variance(k2)[0] != pytest.approx(kl, rel=0.01)
        near = torch.log_softmax(LOGITS + 1e-3 * torch.arange(8), dim=0)
        kl = exact_kl(near, LOGPROBS).item()
        assert mean_and_variance(k2, near, LOGPROBS)[0] == pytest.approx(kl, rel=0.01)

    def test_k3_has_far_less_variance_than_k1_near_the_reference_and_more_far_from_it(self):
        near = torch.log_softmax(LOGITS + 0.1 * OTHER_LOGITS, dim=0)
        assert mean_and_variance(k3, near, LOGPROBS)[1] < 0.05 * mean_and_variance(k1, near, LOGPROBS)[1]
        assert mean_and_variance(k3)[1] > mean_and_variance(k1)[1]

    @pytest.mark.parametrize(
        ("estimator", "mean", "variance"),
        # π = (½, ½), π_ref = (¼, ¾): log-ratios 0.693147 and -0.405465, KL 0.143841, r = ½ and 3/2.
        # Two values a, b of equal probability have the mean (a + b)/2 and the variance ((a - b)/2)².
        [
            (k1, 0.143841, 0.301737),  # 0.693147, -0.405465
            (k2, 0.161214, 0.006243),  # ½ 0.480453, ½ 0.164402
            (k3, 0.143841, 0.002431),  # ½ - 1 + 0.693147, 3/2 - 1 - 0.405465
        ],
    )
    def test_its_expectation_and_variance_by_hand(self, estimator, mean, variance):
        logprobs = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
        ref_logprobs = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
        assert mean_and_variance(estimator, logprobs, ref_logprobs) == pytest.approx((mean, variance), abs=1e-6)

    def test_k1_and_k2_have_the_variance_that_moments_of_the_log_ratio_give(self):
        moments = [(P * (LOGPROBS - REF_LOGPROBS) ** power).sum().item() for power in (1, 2, 4)]
        assert mean_and_variance(k1)[1] == pytest.approx(moments[1] - moments[0] ** 2)
        assert mean_and_variance(k2)[1] == pytest.approx(moments[2] / 4 - moments[1] ** 2 / 4)

    def test_only_k1_can_be_negative(self):
        assert k1(LOGPROBS, REF_LOGPROBS).min() < 0
        assert k2(LOGPROBS, REF_LOGPROBS).min() >= 0 and k3(LOGPROBS, REF_LOGPROBS).min() >= 0

    def test_hand_worked_numbers(self):
        # π = 0.5, π_ref = 0.25: k1 = log 2 = 0.693147; k2 = ½ 0.480453 = 0.240227; k3 = 0.5 - 1 + 0.693147 = 0.193147
        logprobs, ref_logprobs = torch.tensor(0.5).log(), torch.tensor(0.25).log()
        actual = [estimator(logprobs, ref_logprobs).item() for estimator in (k1, k2, k3)]
        assert actual == pytest.approx([0.693147, 0.240227, 0.193147], abs=1e-6)

    @pytest.mark.parametrize("estimator", [k1, k2, k3])
    @pytest.mark.parametrize("logratio", [-100.0, 100.0])
    def test_value_and_gradient_are_finite_at_log_ratios_of_100(self, estimator, logratio):
        logprobs = torch.tensor([logratio], requires_grad=True)
        value = estimator(logprobs, torch.zeros(1))
        value.sum().backward()
        assert value.isfinite().all() and logprobs.grad.isfinite().all()

    def test_k3_pulls_back_a_token_that_the_reference_gives_up(self):
        logprobs = torch.tensor([0.0], requires_grad=True)
        k3(logprobs, torch.tensor([-100.0])).sum().backward()
        assert logprobs.grad.item() == 1.0

    def test_the_clamp_leaves_log_ratios_up_to_20_alone(self):
        ratios = torch.tensor([-30.0, -20.0, 0.5, 20.0, 30.0])
        assert clamped_logratio(ratios, torch.zeros(5)).tolist() == [-20.0, -20.0, 0.5, 20.0, 20.0]


class TestGradients:
    """What each estimator does as a loss, from tokens sampled from the present policy."""

    def test_k1_teaches_nothing(self):
        assert torch.allclose(mean_gradient(k1), torch.zeros(8, dtype=torch.float64), atol=1e-12)

    def test_k2_has_the_gradient_of_the_kl(self):
        assert torch.allclose(mean_gradient(k2), exact_gradient(lambda logprobs: exact_kl(logprobs, REF_LOGPROBS)))

    def test_k3_has_the_gradient_of_the_opposite_kl(self):
        opposite = exact_gradient(lambda logprobs: exact_kl(REF_LOGPROBS, logprobs))
        assert torch.allclose(mean_gradient(k3), opposite)
        assert not torch.allclose(mean_gradient(k3), mean_gradient(k2))

    def test_k3_with_k2_gradient_has_the_value_of_one_and_the_gradient_of_the_other(self):
        def estimate(logprobs, ref_logprobs):
            return with_k2_gradient(k3(logprobs, ref_logprobs), logprobs, ref_logprobs)

        assert torch.allclose(estimate(LOGPROBS, REF_LOGPROBS), k3(LOGPROBS, REF_LOGPROBS))
        assert torch.allclose(mean_gradient(estimate), mean_gradient(k2))

    def test_k1_in_the_reward_has_the_gradient_of_the_kl(self):
        # The score-function estimator: E_π[k1 ∇log π], k1 as a reward without gradient.
        gradient = mean_gradient(lambda logprobs, ref: k1(logprobs, ref).detach() * logprobs)
        assert torch.allclose(gradient, exact_gradient(lambda logprobs: exact_kl(logprobs, REF_LOGPROBS)))


class TestSequences:
    def test_k2_of_whole_responses_by_hand(self):
        # log-ratios 1, 2 of one response and -3 of another: ½ 3² in two shares, ½ 3²
        ids = torch.tensor([0, 0, 1])
        logprobs, ref = torch.tensor([0.0, 0.0, -3.0]), torch.tensor([-1.0, -2.0, 0.0])
        assert sequence_k2(logprobs, ref, ids).tolist() == [2.25, 2.25, 4.5]
        assert sequence_sums(logprobs - ref, ids).tolist() == [3.0, 3.0, -3.0]

    def test_its_gradient_on_each_token_is_the_log_ratio_of_the_whole_response(self):
        logprobs = torch.tensor([0.0, 0.0, -3.0], requires_grad=True)
        sequence_k2(logprobs, torch.tensor([-1.0, -2.0, 0.0]), torch.tensor([0, 0, 1])).sum().backward()
        assert logprobs.grad.tolist() == [3.0, 3.0, -3.0]

    def test_of_responses_of_one_token_it_is_k2(self):
        ids = torch.arange(8)
        assert torch.equal(sequence_k2(LOGPROBS, REF_LOGPROBS, ids), k2(LOGPROBS, REF_LOGPROBS))
