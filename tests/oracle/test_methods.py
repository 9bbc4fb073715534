"""Methods as the judge takes them: defaults of the algorithms, and their losses against ones written out by hand."""

from functools import partial

import pytest
import torch

from lit_rlhf import GRPO, PPO, DrGRPO, KLPenalty, ReMax
from lit_rlhf.losses import cispo_policy_loss, dr_grpo, gae, grpo, policy_gradient_loss, ppo_policy_loss, reinforce
from lit_rlhf.oracle import GradientJudge, OnPolicyMethod, random_problem
from lit_rlhf.oracle.groups import own_slopes

PROBLEM = random_problem(3, 2, num_prompts=2)
POLICY = PROBLEM.table_policy().moved(1.0)
JUDGE = GradientJudge(PROBLEM, 0.3, POLICY, POLICY.moved(0.1, seed=1))


def test_its_defaults_are_those_of_the_algorithm_but_for_what_is_changed():
    assert OnPolicyMethod.of(GRPO) == OnPolicyMethod(grpo, ppo_policy_loss, KLPenalty("loss", "k3"), False, "responses")
    assert OnPolicyMethod.of(DrGRPO, loss=cispo_policy_loss) == OnPolicyMethod(
        dr_grpo, cispo_policy_loss, KLPenalty("loss", "k3"), False, "max_new_tokens"
    )
    assert OnPolicyMethod.of(PPO) == OnPolicyMethod(gae, ppo_policy_loss, KLPenalty(), True, "tokens")
    assert OnPolicyMethod.of(ReMax).kl_penalty == KLPenalty("reward", "k1")


def test_a_mean_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"loss_average \('words'\) must be tokens"):
        OnPolicyMethod.of(GRPO, loss_average="words")


def test_grpo_is_what_its_paper_says_group_by_group():
    groups = JUDGE.groups(3)
    mean_length = (groups.weights * groups.response_mask.sum(1)).sum()

    def by_hand(group):
        advantages = (group.scores - group.scores.mean()) / (group.scores.std() + 1e-4)
        ratio = (group.logprobs - group.old_logprobs).exp()
        surrogate = torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
        kl = ratio.detach() * 0.5 * (group.logprobs - group.ref_logprobs).square()  # k2's gradient for k3
        losses = (-surrogate + 0.3 * kl) * group.response_mask
        return (losses.sum(1) / group.response_mask.sum(1)).mean() * mean_length

    torch.testing.assert_close(OnPolicyMethod.of(GRPO).slopes(groups, 0.3), own_slopes(groups, by_hand))


def test_the_running_mean_is_that_of_all_returns():
    groups = JUDGE.groups()
    old, ref = groups.old_logprobs.sum(1), groups.ref_logprobs.sum(1)
    returns = groups.scores - 0.3 * (old - ref)
    mean = (old.exp() * returns).sum() / 2  # of two prompts
    torch.testing.assert_close(
        OnPolicyMethod(reinforce, policy_gradient_loss).credited(groups, 0.3)[:, 0], returns - mean
    )


def test_greedy_scores_are_those_of_the_policy_that_plays():
    groups, tree, old = JUDGE.groups(), PROBLEM.tree, POLICY.moved(0.1, seed=1)
    for number, prompt in enumerate(PROBLEM.prompts):
        best = tree.most_likely(tree.tabulate(old.logprob_fn, prompt))
        score = PROBLEM.reward_fn(prompt, tree.completions, tree.lengths)[best]
        assert (groups.greedy_scores.view(2, 7)[number] == score).all()  # 7 responses to a prompt


def test_whitened_advantages_have_mean_0_and_variance_1_over_all_tokens():
    groups = JUDGE.groups(2)
    method = OnPolicyMethod(partial(reinforce, baseline="none"), policy_gradient_loss, whiten_advantages=True)
    advantages = method.credited(groups, 0.3)
    weights = groups.weights[:, None] * groups.response_mask
    mean = (weights * advantages).sum() / weights.sum()
    assert mean.item() == pytest.approx(0, abs=1e-9)
    assert ((weights * advantages.square()).sum() / weights.sum()).item() == pytest.approx(1)


@pytest.mark.parametrize("place", ["reward", "loss"])
def test_a_critic_knows_the_values_of_what_is_charged(place):
    # With λ = 0 and exact values, A = Q - V of each token: its mean over the policy's tokens is 0 in every state.
    method = OnPolicyMethod(partial(gae, gae_lambda=0.0), policy_gradient_loss, KLPenalty(place, "k1"))
    groups = JUDGE.groups()
    first = groups.weights * method.credited(groups, 0.3)[:, 0]
    assert first.view(2, 7).sum(1).tolist() == pytest.approx([0, 0], abs=1e-9)
