import math

import pytest
import torch

from lit_rlhf.losses import alpha_link, forward_kl_link, jensen_shannon_link, reverse_kl_link
from lit_rlhf.losses.advantages import ScoredRollout, gae, token_rewards
from lit_rlhf.losses.kl import k1
from lit_rlhf.oracle import (
    Oracle,
    TablePolicy,
    TokenTree,
    bayes_accuracy,
    divergence_optimum,
    kl_divergence,
    log_partition,
    objective,
    optimal_logprobs,
    optimal_values,
    policy_values,
)
from tests.oracle.small_trees import (
    PROMPT,
    SlowTree,
    as_tuples,
    every_shape,
    one_prompt,
    random_policy,
    random_reward,
    tiny_llama,
)


@pytest.mark.parametrize("beta", [0.05, 0.5, 2.0])
class TestClosedForm:
    def solve(self, beta):
        tree, ref_table, table, rewards = one_prompt(4, [0], 4)
        reference, policy = tree.completion_logprobs(ref_table), tree.completion_logprobs(table)
        return reference, policy, rewards, optimal_logprobs(reference, rewards, beta)

    def test_the_optimum_sums_to_one(self, beta):
        *_, optimum = self.solve(beta)
        assert optimum.exp().sum().item() == pytest.approx(1)

    def test_its_objective_is_beta_log_z(self, beta):
        reference, _, rewards, optimum = self.solve(beta)
        assert objective(optimum, reference, rewards, beta).item() == pytest.approx(
            beta * log_partition(reference, rewards, beta).item()
        )

    def test_kl_to_the_optimum_is_the_loss_of_objective_over_beta(self, beta):
        reference, policy, rewards, optimum = self.solve(beta)
        best = objective(optimum, reference, rewards, beta)
        for other in (policy, reference, optimum):
            lost = best - objective(other, reference, rewards, beta)
            assert kl_divergence(other, optimum).item() == pytest.approx(lost.item() / beta, abs=1e-9)

    def test_the_implicit_reward_is_the_reward_up_to_a_constant(self, beta):
        reference, _, rewards, optimum = self.solve(beta)
        difference = beta * (optimum - reference) - rewards
        assert torch.allclose(difference, difference[0].expand_as(difference))

    def test_z_is_the_mean_of_exponentiated_rewards(self, beta):
        reference, _, rewards, _ = self.solve(beta)
        slow = sum(
            math.exp(lp) * math.exp(r / beta) for lp, r in zip(reference.tolist(), rewards.tolist(), strict=True)
        )
        assert log_partition(reference, rewards, beta).item() == pytest.approx(math.log(slow))

    def test_the_gradient_of_the_objective_vanishes_at_the_optimum_alone(self, beta):
        tree, ref_table, table, rewards = one_prompt(3, [0], 3)
        reference = tree.completion_logprobs(ref_table)
        values = optimal_values(tree, ref_table, rewards, beta)
        optimum = [ref + a / beta for ref, a in zip(ref_table, values.advantages, strict=True)]
        for start, vanishes in ((optimum, True), (table, False)):
            logits = [level.clone().requires_grad_() for level in start]
            logprobs = tree.completion_logprobs([torch.log_softmax(level, -1) for level in logits])
            objective(logprobs, reference, rewards, beta).backward()
            steepest = max(level.grad.abs().max().item() for level in logits)
            assert (steepest < 1e-9) == vanishes


def test_kl_counts_impossible_outcomes_as_zero_and_impossible_references_as_infinite():
    half, sure = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
    assert kl_divergence(sure, half).item() == pytest.approx(math.log(2))
    assert kl_divergence(half, sure).item() == math.inf
    assert kl_divergence(sure, sure).item() == 0


class TestValues:
    @pytest.mark.parametrize("beta", [0.1, 1.0])
    @every_shape
    def test_they_agree_with_a_slow_recursion(self, vocab_size, stop_ids, max_new_tokens, beta):
        tree, ref_table, table, rewards = one_prompt(vocab_size, stop_ids, max_new_tokens)
        slow = SlowTree(vocab_size, stop_ids, max_new_tokens)
        reward = dict(zip(as_tuples(tree), rewards.tolist(), strict=True))
        reference, policy = random_policy(vocab_size, 0), random_policy(vocab_size, 1)
        optimal, actual = (
            optimal_values(tree, ref_table, rewards, beta),
            policy_values(tree, table, ref_table, rewards, beta),
        )
        for level in range(max_new_tokens):
            for i, prefix in enumerate(map(tuple, tree.prefixes(level).tolist())):
                best = slow.optimal_value(reference, reward, beta, prefix)
                assert optimal.values[level][i].item() == pytest.approx(best)
                value = slow.policy_value(policy, reference, reward, beta, prefix)
                assert actual.values[level][i].item() == pytest.approx(value)
                for token in range(vocab_size):
                    q = slow.optimal_value(reference, reward, beta, (*prefix, token))
                    assert optimal.action_values[level][i, token].item() == pytest.approx(q)

    def test_the_value_of_the_root_is_the_objective(self):
        tree, ref_table, table, rewards = one_prompt(4, [0], 4)
        reference, policy = tree.completion_logprobs(ref_table), tree.completion_logprobs(table)
        root = optimal_values(tree, ref_table, rewards, 0.3).values[0].item()
        assert root == pytest.approx(0.3 * log_partition(reference, rewards, 0.3).item())
        root = policy_values(tree, table, ref_table, rewards, 0.3).values[0].item()
        assert root == pytest.approx(objective(policy, reference, rewards, 0.3).item())

    def test_the_policy_of_the_optimal_advantages_is_the_optimum(self):
        tree, ref_table, _, rewards = one_prompt(4, [0], 4)
        values = optimal_values(tree, ref_table, rewards, 0.3)
        table = [ref + a / 0.3 for ref, a in zip(ref_table, values.advantages, strict=True)]
        assert all(torch.allclose(level.exp().sum(-1), torch.ones((), dtype=torch.float64)) for level in table)
        optimum = optimal_logprobs(tree.completion_logprobs(ref_table), rewards, 0.3)
        assert torch.allclose(tree.completion_logprobs(table), optimum)

    def test_no_policy_has_a_larger_value_anywhere(self):
        tree, ref_table, table, rewards = one_prompt(4, [0], 4)
        best = optimal_values(tree, ref_table, rewards, 0.3).values
        actual = policy_values(tree, table, ref_table, rewards, 0.3).values
        assert all((b >= a).all() for b, a in zip(best, actual, strict=True))

    def test_tables_that_would_broadcast_are_refused_by_name(self):
        tree, ref_table, table, rewards = one_prompt(4, [0], 3)
        narrow = [level[:1] for level in table]
        with pytest.raises(ValueError, match=r"ref_table must be \(3, 4\) at level 1, got \(1, 4\)"):
            optimal_values(tree, narrow, rewards, 0.3)
        with pytest.raises(ValueError, match=r"^table must be \(3, 4\) at level 1, got \(1, 4\)"):
            policy_values(tree, narrow, ref_table, rewards, 0.3)
        with pytest.raises(ValueError, match=r"must be \(40,\), got \(39,\)"):
            optimal_values(tree, ref_table, rewards[:-1], 0.3)

    @pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 1.0])
    def test_gae_of_the_optimal_policy_and_critic_is_zero_on_every_completion(self, gae_lambda):
        tree, ref_table, _, rewards = one_prompt(4, [0], 4)
        optimal = optimal_values(tree, ref_table, rewards, 0.3)
        table = [ref + a / 0.3 for ref, a in zip(ref_table, optimal.advantages, strict=True)]
        advantages, returns, mask = self.gae_on_all(tree, table, ref_table, rewards, optimal.values, gae_lambda)
        assert torch.allclose(advantages, torch.zeros_like(advantages), atol=1e-9)
        assert torch.allclose(returns, tree.along(optimal.values) * mask)

    @pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
    def test_gae_has_the_exact_advantage_as_its_mean(self, gae_lambda):
        tree, ref_table, table, rewards = one_prompt(4, [0], 4)
        values = policy_values(tree, table, ref_table, rewards, 0.3)
        advantages, _, mask = self.gae_on_all(tree, table, ref_table, rewards, values.values, gae_lambda)
        exact = tree.along(
            [a - 0.3 * (lp - ref) for a, lp, ref in zip(values.advantages, table, ref_table, strict=True)]
        )
        probabilities = tree.completion_logprobs(table).exp()
        if gae_lambda == 0:  # transitions are sure: one-step TD with the exact critic has no variance at all
            assert torch.allclose(advantages, exact)
        for t in range(tree.max_new_tokens):  # the mean over what follows a state and action
            groups = {}
            for row, y in enumerate(as_tuples(tree)):
                if mask[row, t]:
                    groups.setdefault(y[: t + 1], []).append(row)
            for rows in groups.values():
                weights = probabilities[rows] / probabilities[rows].sum()
                assert (weights * advantages[rows, t]).sum().item() == pytest.approx(exact[rows[0], t].item())

    @staticmethod
    def gae_on_all(tree, table, ref_table, rewards, values, gae_lambda):
        mask = torch.arange(tree.max_new_tokens) < tree.lengths[:, None]
        kl = k1(tree.along(table), tree.along(ref_table))
        rollout = ScoredRollout(token_rewards(rewards, kl, 0.3, mask), tree.along(values), mask)
        advantages, returns = gae(rollout, gamma=1.0, gae_lambda=gae_lambda)
        return advantages, returns, mask


class TestOracle:
    tree = TokenTree(4, [0], 4)
    prompts = (torch.tensor([1, 2]), torch.tensor([3]))

    def oracle(self, beta=0.3, reward_fn=random_reward):
        return Oracle(self.tree, self.prompts, random_policy(4, 0), reward_fn, beta)

    def test_the_reference_has_gap_one_and_no_kl(self):
        evaluation = self.oracle().evaluate(random_policy(4, 0))
        assert (evaluation.gap, evaluation.kl) == pytest.approx((1.0, 0.0))

    def test_the_optimum_has_gap_zero(self):
        oracle = self.oracle()
        tables = {}
        for i, prompt in enumerate(self.prompts):
            values = oracle.optimal_values(i)
            advantages = zip(oracle.ref_tables[i], values.advantages, strict=True)
            tables[tuple(prompt.tolist())] = [ref + a / 0.3 for ref, a in advantages]
        evaluation = oracle.evaluate(lambda prompt, prefixes: tables[tuple(prompt.tolist())][prefixes.shape[1]])
        assert evaluation.gap == pytest.approx(0, abs=1e-9)
        assert evaluation.kl_to_optimum == pytest.approx(0, abs=1e-9)
        assert evaluation.objective == pytest.approx(oracle.optimal_objective)

    def test_an_evaluation_is_the_mean_over_prompts_of_the_exact_quantities(self):
        oracle, policy = self.oracle(), random_policy(4, 1)
        evaluation = oracle.evaluate(policy)
        rewards = []
        for prompt in self.prompts:
            logprobs = self.tree.completion_logprobs(self.tree.tabulate(policy, prompt))
            all_rewards = random_reward(prompt, self.tree.completions, self.tree.lengths)
            rewards.append(sum(math.exp(lp) * r for lp, r in zip(logprobs.tolist(), all_rewards.tolist(), strict=True)))
        assert evaluation.reward == pytest.approx(sum(rewards) / 2)
        assert evaluation.objective == pytest.approx(evaluation.reward - 0.3 * evaluation.kl)
        assert evaluation.kl_to_optimum == pytest.approx((oracle.optimal_objective - evaluation.objective) / 0.3)

    def test_a_constant_reward_leaves_no_gap_to_measure(self):
        oracle = self.oracle(reward_fn=lambda prompt, completions, lengths: torch.ones(len(completions)))
        evaluation = oracle.evaluate(random_policy(4, 0))
        assert math.isnan(evaluation.gap) and evaluation.kl_to_optimum == pytest.approx(0, abs=1e-9)

    @pytest.mark.parametrize("scale", [1e-6, 1e6])
    def test_the_gap_does_not_depend_on_the_unit_of_rewards(self, scale):
        def scaled(prompt, completions, lengths):
            return scale * random_reward(prompt, completions, lengths)

        evaluation = self.oracle(beta=0.3 * scale, reward_fn=scaled).evaluate(random_policy(4, 1))
        assert evaluation.gap == pytest.approx(self.oracle().evaluate(random_policy(4, 1)).gap)
        assert self.oracle(reward_fn=scaled).evaluate(random_policy(4, 0)).gap == pytest.approx(1, abs=0.01)

    def test_no_prompts_are_refused_and_a_list_of_rewards_will_do(self):
        with pytest.raises(ValueError, match="prompts is empty"):
            Oracle(self.tree, [], random_policy(4, 0), random_reward, 0.3)
        oracle = self.oracle(reward_fn=lambda *args: random_reward(*args).tolist())
        assert oracle.optimal_objective == pytest.approx(self.oracle().optimal_objective)

    def test_prompts_may_be_lists_of_token_ids(self):
        listed = [prompt.tolist() for prompt in self.prompts]
        oracle = Oracle(self.tree, listed, random_policy(4, 0), random_reward, 0.3)
        policy = TablePolicy(self.tree, listed, random_policy(4, 1))
        assert oracle.evaluate(policy.logprob_fn) == pytest.approx(
            self.oracle().evaluate(random_policy(4, 1)), rel=1e-12
        )

    @pytest.mark.usefixtures("wrong_types")
    @pytest.mark.parametrize(
        ("prompts", "got"),
        [([1, 2], r"\(\) torch.int64"), (PROMPT, r"\(\) torch.int64"), ([[1.5]], r"\(1,\) torch.float32")],
    )
    def test_one_prompt_in_place_of_a_list_and_what_is_no_token_id_are_refused(self, prompts, got):
        with pytest.raises(ValueError, match=rf"each \(P,\) integer token ids; one of them is {got}"):
            Oracle(self.tree, prompts, random_policy(4, 0), random_reward, 0.3)

    @pytest.mark.usefixtures("wrong_types")
    @pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:1], [3], 2, -1])
    def test_values_are_asked_for_by_the_number_of_a_prompt(self, prompt):
        with pytest.raises(ValueError, match="must be the number of a prompt, 0 to 1"):
            self.oracle().optimal_values(prompt)

    def test_a_model_in_place_of_a_policy_is_answered_with_causal_lm(self):
        with pytest.raises(ValueError, match=r"of a LlamaForCausalLM, give causal_lm\(model\)"):
            self.oracle().evaluate(tiny_llama())

    def test_a_beta_of_zero_is_refused_by_name(self):
        with pytest.raises(ValueError, match=r"beta \(0.0\)"):
            self.oracle(beta=0.0)

    def test_rewards_of_another_shape_or_nan_are_refused(self):
        for bad in (torch.zeros(3), torch.full((self.tree.num_completions,), torch.nan)):
            with pytest.raises(ValueError, match="finite rewards"):
                self.oracle(reward_fn=lambda prompt, completions, lengths, bad=bad: bad)


def test_bayes_accuracy_is_what_the_true_reward_attains_on_sampled_preferences():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 100_000, generator=generator)
    first_wins = torch.rand(100_000, generator=generator) < (first - second).sigmoid()
    chosen, rejected = torch.where(first_wins, first, second), torch.where(first_wins, second, first)
    attained = (chosen > rejected).double().mean().item()
    assert bayes_accuracy(chosen, rejected).item() == pytest.approx(attained, abs=0.006)  # four standard errors


def test_bayes_accuracy_of_ties_is_one_half_and_of_nothing_is_refused():
    assert bayes_accuracy(torch.ones(3), torch.ones(3)).item() == 0.5
    with pytest.raises(ValueError, match="no pairs"):
        bayes_accuracy(torch.empty(0), torch.empty(0))


class TestDivergenceOptimum:
    rewards = torch.rand(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reference = torch.log_softmax(torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 0)

    def test_under_the_reverse_kl_it_is_the_closed_form(self):
        optimum = divergence_optimum(self.reference, self.rewards, 0.2, reverse_kl_link)
        assert torch.allclose(optimum, optimal_logprobs(self.reference, self.rewards, 0.2))

    def test_it_is_the_closed_form_where_log_ratios_are_in_the_hundreds(self):
        reference, rewards = (
            torch.log_softmax(torch.tensor([0.0, -100.0], dtype=torch.float64), 0),
            torch.tensor([0.0, 1.0], dtype=torch.float64),
        )
        optimum = divergence_optimum(reference, rewards, 0.005, reverse_kl_link)
        assert torch.allclose(optimum, optimal_logprobs(reference, rewards, 0.005))
        assert optimum.tolist() == pytest.approx([-100, 0], abs=1e-9)  # Z = 1 + e^-100 e^200
        steep = divergence_optimum(reference, rewards, 0.005, lambda logratio: 0.01 * logratio)  # as if β were 5e-5
        assert torch.allclose(steep, optimal_logprobs(reference, rewards, 5e-5))

    @pytest.mark.parametrize("link", [forward_kl_link, jensen_shannon_link, alpha_link(0.5)])
    def test_its_implicit_reward_is_the_reward_up_to_a_constant(self, link):
        optimum = divergence_optimum(self.reference, self.rewards, 0.2, link)
        difference = 0.2 * link(optimum - self.reference) - self.rewards
        assert optimum.exp().sum().item() == pytest.approx(1)
        assert torch.allclose(difference, difference[0].expand(12), atol=1e-6)

    def test_no_neighbour_is_better_under_forward_kl(self):
        def value(logprobs):  # E_π[r] - β KL(π_ref‖π)
            return (logprobs.exp() * self.rewards).sum() - 0.2 * kl_divergence(self.reference, logprobs)

        optimum = divergence_optimum(self.reference, self.rewards, 0.2, forward_kl_link)
        for seed in range(20):
            step = 0.05 * torch.randn(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            assert value(torch.log_softmax(optimum + step, 0)) < value(optimum)
