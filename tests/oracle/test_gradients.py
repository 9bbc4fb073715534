"""The judge of gradients, against finite differences, against sampling, and on losses whose gradient is known."""

import math
from functools import partial

import pytest
import torch

from lit_rlhf import GRPO, PPO, RLOO, DrGRPO, KLPenalty, ReMax
from lit_rlhf.losses import policy_gradient_loss, reinforce
from lit_rlhf.oracle import GradientJudge, OnPolicyMethod, TablePolicy, random_problem

PROBLEM, BETA = random_problem(3, 3, num_prompts=2), 0.2
POLICY = PROBLEM.table_policy().moved(1.0)
ON_POLICY = GradientJudge(PROBLEM, BETA, POLICY)
OFF_POLICY = GradientJudge(PROBLEM, BETA, POLICY, POLICY.moved(0.2, seed=1))
KL_ALONE = PROBLEM._replace(reward_fn=lambda prompt_ids, completions, lengths: torch.zeros(len(lengths)))


def test_the_exact_gradient_is_that_of_finite_differences():
    oracle, step = PROBLEM.oracle(BETA), 1e-5
    slopes = []
    for place in range(POLICY.logits.numel()):
        ends = []
        for sign in (1, -1):
            policy = TablePolicy(PROBLEM.tree, PROBLEM.prompts)
            with torch.no_grad():
                policy.logits.copy_(POLICY.logits)
                policy.logits.view(-1)[place] += sign * step
            ends.append(oracle.evaluate(policy.logprob_fn).objective)
        slopes.append((ends[0] - ends[1]) / (2 * step))
    torch.testing.assert_close(ON_POLICY.exact, torch.tensor(slopes, dtype=torch.float64), atol=1e-8, rtol=1e-6)


def test_mean_and_variance_are_those_of_sampled_groups():
    """Off policy, with the division by the standard deviation: token by token from the table, through autograd."""
    N, draw, old = 40_000, torch.Generator().manual_seed(0), POLICY.moved(0.2, seed=1)
    numbers = torch.randint(2, (N,), generator=draw).repeat_interleave(2)  # groups of two
    responses, alive = torch.zeros(2 * N, 3, dtype=torch.int64), torch.ones(2 * N, dtype=torch.bool)
    mask = torch.zeros(2 * N, 3, dtype=torch.bool)
    for t in range(3):
        with torch.no_grad():
            probabilities = old(old.states(numbers, responses)[:, t]).exp()
        mask[:, t] = alive
        responses[:, t] = torch.where(alive, torch.multinomial(probabilities, 1, generator=draw)[:, 0], 0)
        alive = alive & (responses[:, t] != 0)
    tree = PROBLEM.tree
    rewards, digits = torch.zeros(2, 27, dtype=torch.float64), torch.tensor([9, 3, 1])
    for number, prompt in enumerate(PROBLEM.prompts):
        rewards[number, tree.completions @ digits] = PROBLEM.reward_fn(prompt, tree.completions, tree.lengths)
    scores = rewards[numbers, responses @ digits].view(N, 2)
    advantages = (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4)

    states = POLICY.states(numbers, responses)
    logprobs = POLICY(states).gather(-1, responses[..., None])[..., 0]
    with torch.no_grad():
        ratio = (logprobs - old(old.states(numbers, responses)).gather(-1, responses[..., None])[..., 0]).exp()
    # Of each token ∇ log π is its one-hot minus π, by the logits of its state alone.
    weight = (ratio * advantages.flatten()[:, None] * mask / 2).detach()
    by_logits = weight[..., None] * (torch.nn.functional.one_hot(responses, 3) - POLICY(states).exp().detach())
    steps = torch.zeros(N, *POLICY.logits.shape, dtype=torch.float64)
    steps.index_put_((torch.arange(N).repeat_interleave(6), states.flatten()), by_logits.flatten(0, 1), accumulate=True)
    steps = steps.flatten(1)

    def loss(group):
        advantages = (group.scores - group.scores.mean()) / (group.scores.std() + 1e-4)
        ratio = (group.logprobs - group.old_logprobs).exp().detach()
        return -(ratio * advantages[:, None] * group.logprobs * group.response_mask).sum(1).mean()

    report, mean, exact = OFF_POLICY.measure(loss, group_size=2), steps.mean(0), OFF_POLICY.exact
    error = ((steps.var(0).sum() / N).sqrt() / mean.norm()).item()  # of the mean, of its norm
    assert error < 0.03
    assert torch.nn.functional.cosine_similarity(mean, exact, dim=0).item() == pytest.approx(report.cosine, abs=error)
    assert (mean.norm() / exact.norm()).item() == pytest.approx(report.norm_ratio, rel=2 * error)
    assert (2 * steps.var(0).sum() / mean.square().sum()).item() == pytest.approx(report.variance, rel=4 * error)


@pytest.mark.parametrize(
    ("method", "size", "norm_ratio"),
    [
        (OnPolicyMethod.of(PPO, whiten_advantages=False), 1, 1.0),
        (OnPolicyMethod(partial(reinforce, baseline="none"), policy_gradient_loss), 1, 1.0),
        (OnPolicyMethod.of(RLOO), 3, 1.0),
        (OnPolicyMethod.of(RLOO, kl_penalty=KLPenalty("loss", "k2_sequence")), 3, 1.0),
        (OnPolicyMethod.of(DrGRPO, kl_penalty=KLPenalty()), 3, 2 / 3),  # (G - 1)/G: the mean holds the own return
        (OnPolicyMethod.of(ReMax), 1, 1.0),
    ],
    ids=["ppo", "reinforce", "rloo", "rloo, k2 of responses", "dr_grpo", "remax"],
)
def test_on_policy_these_climb_the_objective_exactly(method, size, norm_ratio):
    report = ON_POLICY.measure(method, size)
    assert report.cosine == pytest.approx(1, abs=1e-9)
    assert report.norm_ratio == pytest.approx(norm_ratio, rel=1e-9)
    assert report.variance > 1


def test_grpo_and_the_kl_of_tokens_do_not():
    assert ON_POLICY.measure(OnPolicyMethod.of(GRPO), 3).cosine < 0.99
    assert ON_POLICY.measure(OnPolicyMethod.of(RLOO, kl_penalty=KLPenalty("loss", "k3")), 3).cosine < 0.999


def test_a_loss_of_ones_own_is_judged_as_the_method_that_it_is():
    def own(group):
        others = (group.scores.sum() - group.scores) / (len(group.scores) - 1)
        return -((group.scores - others)[:, None] * group.logprobs).sum(1).mean()

    plain = GradientJudge(PROBLEM, 0.0, POLICY)
    mine, theirs = plain.measure(own, 2), plain.measure(OnPolicyMethod.of(RLOO), 2)
    assert mine == pytest.approx(theirs)
    assert mine.cosine == pytest.approx(1)


def test_a_gradient_that_is_zero_in_the_mean_has_no_direction():
    judge = GradientJudge(KL_ALONE, 1.0, POLICY)
    report = judge.measure(lambda group: (group.logprobs - group.ref_logprobs).sum(1).mean())  # k1 in the loss
    assert math.isnan(report.cosine)
    assert math.isnan(report.variance)
    assert report.norm_ratio == pytest.approx(0, abs=1e-9)


def test_a_mean_over_prompts_and_over_groups_costs_what_one_group_does_per_response():
    # Groups of independent responses without a baseline: per response, the variance is that of single ones.
    loss = OnPolicyMethod(partial(reinforce, baseline="none"), policy_gradient_loss)
    one_prompt = GradientJudge(random_problem(3, 3), BETA)
    assert one_prompt.measure(loss, 3) == pytest.approx(one_prompt.measure(loss, 1))


def test_a_negative_beta_is_refused():
    with pytest.raises(ValueError, match=r"beta \(-1\)"):
        GradientJudge(PROBLEM, -1)


def test_a_problem_of_too_many_responses_is_refused():
    with pytest.raises(ValueError, match=r"problem has 6,825 tokens in all.*5,000 at most; lower its"):
        GradientJudge(random_problem(5, 5), BETA)
