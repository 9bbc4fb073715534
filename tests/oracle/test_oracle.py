import itertools
import math
import re

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lit_rlhf.engine.attention import IMPLEMENTATION
from lit_rlhf.losses import alpha_link, forward_kl_link, jensen_shannon_link, reverse_kl_link
from lit_rlhf.losses.advantages import gae, token_rewards
from lit_rlhf.losses.kl import k1
from lit_rlhf.models.policy import Policy
from lit_rlhf.oracle import (
    Oracle,
    TablePolicy,
    TokenTree,
    bayes_accuracy,
    causal_lm,
    divergence_optimum,
    kl_divergence,
    log_partition,
    objective,
    optimal_logprobs,
    optimal_values,
    policy_values,
    small_problems,
    trap_problem,
)
from tests.tiny import plain_logits, tiny_model

PROMPT = torch.tensor([1, 2])


def random_policy(vocab_size, seed):
    """A table policy that depends on prompt and prefix, through a hash that a loop and a batch compute alike."""
    weights = torch.randn(64, vocab_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def logprob_fn(prompt_ids, prefixes):
        key = torch.full((len(prefixes),), int(prompt_ids.sum()))
        for column in prefixes.T:
            key = (5 * key + column + 1) % 64
        return torch.log_softmax(weights[key], dim=-1)

    return logprob_fn


def random_reward(prompt_ids, completions, lengths):
    return torch.sin(3.0 * completions.double().cumsum(1).sum(1) + lengths + prompt_ids.sum())


class SlowTree:
    """The same by recursion over Python tuples, one completion at a time."""

    def __init__(self, vocab_size, stop_ids, max_new_tokens):
        self.V, self.stops, self.T = vocab_size, set(stop_ids), max_new_tokens

    def ended(self, prefix):
        return len(prefix) == self.T or (len(prefix) > 0 and prefix[-1] in self.stops)

    def completions(self, prefix=()):
        if self.ended(prefix):
            return [prefix]
        return [y for token in range(self.V) for y in self.completions((*prefix, token))]

    def step(self, policy, prefix):
        return policy(PROMPT, torch.tensor([prefix], dtype=torch.int64).view(1, -1))[0].tolist()

    def logprob(self, policy, completion):
        return sum(self.step(policy, completion[:t])[completion[t]] for t in range(len(completion)))

    def optimal_value(self, reference, reward, beta, prefix=()):
        if self.ended(prefix):
            return reward[prefix]
        logprobs = self.step(reference, prefix)
        children = [self.optimal_value(reference, reward, beta, (*prefix, token)) for token in range(self.V)]
        return beta * math.log(sum(math.exp(lp + q / beta) for lp, q in zip(logprobs, children, strict=True)))

    def policy_value(self, policy, reference, reward, beta, prefix=()):
        if self.ended(prefix):
            return reward[prefix]
        total = 0.0
        for token, (lp, ref) in enumerate(zip(self.step(policy, prefix), self.step(reference, prefix), strict=True)):
            child = self.policy_value(policy, reference, reward, beta, (*prefix, token))
            total += math.exp(lp) * (child - beta * (lp - ref))
        return total


def as_tuples(tree):
    return [tuple(row[:n]) for row, n in zip(tree.completions.tolist(), tree.lengths.tolist(), strict=True)]


class CountOperations(TorchDispatchMode):
    """Counts tensor operations while it is entered."""

    operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        return func(*args, **(kwargs or {}))


SHAPES = [(4, [0], 3), (4, [1, 3], 3), (2, [], 4), (3, [0, 1, 2], 2), (5, [4], 1)]
every_shape = pytest.mark.parametrize(("vocab_size", "stop_ids", "max_new_tokens"), SHAPES)


class TestTokenTree:
    @every_shape
    def test_it_lists_each_completion_once(self, vocab_size, stop_ids, max_new_tokens):
        tree, slow = TokenTree(vocab_size, stop_ids, max_new_tokens), SlowTree(vocab_size, stop_ids, max_new_tokens)
        listed = as_tuples(tree)
        assert len(listed) == tree.num_completions == len(set(listed))
        assert set(listed) == set(slow.completions())

    def test_the_order_by_hand(self):
        # stop token 0, at most two tokens: [0] has ended; 1 and 2 go on
        assert as_tuples(TokenTree(3, [0], 2)) == [(0,), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]

    @every_shape
    def test_index_finds_each_completion(self, vocab_size, stop_ids, max_new_tokens):
        tree = TokenTree(vocab_size, stop_ids, max_new_tokens)
        assert [tree.index(y) for y in as_tuples(tree)] == list(range(tree.num_completions))

    @pytest.mark.parametrize("tokens", [[], [1], [0, 1], [1, 0, 0], [1, 1, 1, 1], [7, 0], [1, 1, 9]])
    def test_index_refuses_what_is_no_completion(self, tokens):
        with pytest.raises(ValueError, match="is no completion"):
            TokenTree(3, [0], 3).index(tokens)

    @every_shape
    def test_probabilities_sum_to_one_and_agree_with_a_slow_recursion(self, vocab_size, stop_ids, max_new_tokens):
        tree, slow = TokenTree(vocab_size, stop_ids, max_new_tokens), SlowTree(vocab_size, stop_ids, max_new_tokens)
        policy = random_policy(vocab_size, seed=0)
        logprobs = tree.completion_logprobs(tree.tabulate(policy, PROMPT))
        assert logprobs.exp().sum().item() == pytest.approx(1)
        assert logprobs.tolist() == pytest.approx([slow.logprob(policy, y) for y in as_tuples(tree)])

    @every_shape
    def test_along_follows_each_completion_through_states_and_actions(self, vocab_size, stop_ids, max_new_tokens):
        tree, slow = TokenTree(vocab_size, stop_ids, max_new_tokens), SlowTree(vocab_size, stop_ids, max_new_tokens)
        policy = random_policy(vocab_size, seed=0)
        table = tree.tabulate(policy, PROMPT)
        actions, states = tree.along(table), tree.along([level[:, 0] for level in table])
        for row, y in enumerate(as_tuples(tree)):
            own = [slow.step(policy, y[:t]) for t in range(len(y))]
            padding = [0.0] * (max_new_tokens - len(y))
            assert actions[row].tolist() == pytest.approx([own[t][y[t]] for t in range(len(y))] + padding)
            assert states[row].tolist() == pytest.approx([step[0] for step in own] + padding)

    def test_a_million_completions_take_a_few_calls_of_the_policy(self):
        tree, policy, calls = TokenTree(8, [0], 7), random_policy(8, 0), []

        def counted(prompt_ids, prefixes):
            calls.append(len(prefixes))
            return policy(prompt_ids, prefixes)

        assert tree.num_completions == sum(7**t for t in range(6)) + 7**6 * 8  # ended early, and at full length
        oracle = Oracle(tree, [PROMPT], counted, random_reward, beta=0.1)
        assert oracle.optimal_logprobs.exp().sum().item() == pytest.approx(1)
        assert sum(calls) == sum(7**t for t in range(7))  # each prefix once
        assert len(calls) <= 64

    def test_too_many_completions_are_refused_before_memory_is(self):
        with pytest.raises(ValueError, match=r"vocab_size \(32000\) and max_new_tokens \(64\)"):
            TokenTree(32_000, [2], 64)
        with pytest.raises(ValueError, match="more than the 160,000,000 tokens in all that can be enumerated"):
            TokenTree(32_000, [2], 1024)

    @pytest.mark.parametrize(
        ("vocab_size", "stop_ids", "max_new_tokens"),
        [(2, [0], 13_000), (2, [0], 19_999_999), (2, [], 10**7), (3, [0, 1, 2], 10**9)],
    )
    def test_few_completions_that_are_too_long_are_refused_at_once(self, vocab_size, stop_ids, max_new_tokens):
        with pytest.raises(ValueError, match=rf"max_new_tokens \({max_new_tokens}\) make completions of more than"):
            TokenTree(vocab_size, stop_ids, max_new_tokens)

    def test_long_completions_take_operations_by_their_length_not_by_its_square(self):
        operations = []
        for length in (100, 200):
            with CountOperations() as count:
                tree = TokenTree(2, [0], length)
                uniform = tree.tabulate(lambda prompt, prefixes: torch.full((len(prefixes), 2), 0.5).log(), PROMPT)
                assert torch.equal(tree.along(uniform).ne(0).sum(1), tree.lengths)
            operations.append(count.operations)
        assert operations[1] < 2.2 * operations[0]

    @pytest.mark.parametrize("stop_ids", [[3], [-1]])
    def test_stop_ids_out_of_the_vocabulary_are_refused(self, stop_ids):
        with pytest.raises(ValueError, match="stop_ids"):
            TokenTree(3, stop_ids, 2)

    def test_logits_in_place_of_log_probs_are_refused(self):
        with pytest.raises(ValueError, match="do not sum to one"):
            TokenTree(3, [0], 2).tabulate(lambda prompt, prefixes: torch.zeros(len(prefixes), 3), PROMPT)

    def test_nan_is_refused(self):
        with pytest.raises(ValueError, match="do not sum to one"):
            TokenTree(3, [0], 2).tabulate(lambda prompt, prefixes: torch.full((len(prefixes), 3), torch.nan), PROMPT)

    def test_another_vocabulary_is_refused(self):
        with pytest.raises(ValueError, match=r"gave \(1, 4\) for level 0, expected \(1, 3\)"):
            TokenTree(3, [0], 2).tabulate(random_policy(4, 0), PROMPT)


def one_prompt(vocab_size, stop_ids, max_new_tokens):
    tree = TokenTree(vocab_size, stop_ids, max_new_tokens)
    ref_table = tree.tabulate(random_policy(vocab_size, 0), PROMPT)
    table = tree.tabulate(random_policy(vocab_size, 1), PROMPT)
    return tree, ref_table, table, random_reward(PROMPT, tree.completions, tree.lengths)


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
        advantages, returns = gae(
            token_rewards(rewards, kl, 0.3, mask), tree.along(values), mask, gamma=1.0, gae_lambda=gae_lambda
        )
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
        assert oracle.evaluate(policy.logprob_fn) == self.oracle().evaluate(random_policy(4, 1))

    @pytest.mark.parametrize(
        ("prompts", "got"),
        [([1, 2], r"\(\) torch.int64"), (PROMPT, r"\(\) torch.int64"), ([[1.5]], r"\(1,\) torch.float32")],
    )
    def test_one_prompt_in_place_of_a_list_and_what_is_no_token_id_are_refused(self, prompts, got):
        with pytest.raises(ValueError, match=rf"each \(P,\) integer token ids; one of them is {got}"):
            Oracle(self.tree, prompts, random_policy(4, 0), random_reward, 0.3)

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


def tiny_llama(**kwargs):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=5, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, **kwargs).eval()


def tiny_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=5, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=None, eos_token_id=None
    )
    return GPT2LMHeadModel(config)


class TestCausalLM:
    @pytest.mark.parametrize("make_model", [tiny_llama, tiny_gpt2])
    def test_it_agrees_with_one_forward_per_completion(self, make_model):
        model, tree = make_model(), TokenTree(5, [0], 3)
        logprobs = tree.completion_logprobs(tree.tabulate(causal_lm(model), PROMPT))
        assert logprobs.exp().sum().item() == pytest.approx(1)
        model.eval()
        for row in range(0, tree.num_completions, 7):
            y = tree.completions[row, : tree.lengths[row]]
            with torch.no_grad():
                logits = model(input_ids=torch.cat([PROMPT, y])[None]).logits[0].double()
            steps = torch.log_softmax(logits, -1)[len(PROMPT) - 1 : -1]
            assert logprobs[row].item() == pytest.approx(steps.gather(1, y[:, None]).sum().item(), abs=1e-5)

    def test_chunks_change_nothing(self):
        model, prefixes = tiny_llama(), torch.tensor(list(itertools.product(range(5), repeat=2)))
        whole = causal_lm(model)(PROMPT, prefixes)
        assert torch.allclose(causal_lm(model, max_tokens=12)(PROMPT, prefixes), whole, atol=1e-6)

    def test_dropout_is_off_during_the_call_and_the_mode_is_given_back(self):
        model = tiny_gpt2().train()
        model.transformer.h[0].eval()
        prefixes = torch.tensor([[1], [2]])
        assert torch.equal(causal_lm(model)(PROMPT, prefixes), causal_lm(model)(PROMPT, prefixes))
        assert model.training and model.transformer.h[1].training and not model.transformer.h[0].training

    def test_a_model_loaded_for_packed_batches_gives_the_same_and_stays_packed(self):
        prefixes = torch.tensor([[1, 2], [3, 4]])
        packed = tiny_llama(attn_implementation=IMPLEMENTATION)
        assert torch.allclose(causal_lm(packed)(PROMPT, prefixes), causal_lm(tiny_llama())(PROMPT, prefixes), atol=1e-6)
        assert packed.config._attn_implementation == IMPLEMENTATION

    def test_a_packed_gemma_2_keeps_its_soft_caps(self):
        model, prefixes = tiny_model("gemma2"), torch.tensor([[5, 6, 7], [8, 9, 10]])
        rows = torch.cat([PROMPT.expand(2, -1), prefixes], dim=1)
        expected = [torch.log_softmax(plain_logits(model, row)[-1].double(), -1) for row in rows]
        assert torch.allclose(causal_lm(model)(PROMPT, prefixes), torch.stack(expected), atol=1e-6)
        assert model.config._attn_implementation == IMPLEMENTATION

    @pytest.mark.parametrize("fails", ["forward", "set_attn_implementation"])
    def test_mode_and_attention_are_given_back_whatever_fails(self, fails, monkeypatch):
        model = tiny_model("gemma2").train()
        own = getattr(model, fails)

        def broken(*args, **kwargs):
            if args != (IMPLEMENTATION,):
                raise RuntimeError("broken")
            return own(*args, **kwargs)

        monkeypatch.setattr(model, fails, broken)
        with pytest.raises(RuntimeError, match="broken"):
            causal_lm(model)(PROMPT, torch.tensor([[5]]))
        assert model.config._attn_implementation == IMPLEMENTATION
        assert all(module.training for module in model.modules())

    def test_temperature_divides_the_logits(self):
        model, prefixes = tiny_llama(), torch.tensor([[1]])
        cold, warm = causal_lm(model, temperature=0.5), causal_lm(model)
        expected = torch.log_softmax(2 * warm(PROMPT, prefixes), -1)
        assert torch.allclose(cold(PROMPT, prefixes), expected)

    @pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
    def test_a_temperature_that_gives_no_policy_is_refused_by_name(self, temperature):
        with pytest.raises(ValueError, match=rf"temperature \({temperature}\) must be more than 0"):
            causal_lm(tiny_llama(), temperature=temperature)

    def test_what_is_no_model_is_refused_with_where_the_model_is(self):
        with pytest.raises(ValueError, match=r"not a Policy; of a DPO or PPO module, policy.model"):
            causal_lm(Policy(tiny_llama()))

    @pytest.mark.parametrize("prompt", [[], [5], [1, -1]])
    def test_a_prompt_that_the_model_cannot_read_is_refused(self, prompt):
        with pytest.raises(ValueError, match=rf"one or more token ids, 0 to 4; got {re.escape(str(prompt))}"):
            Oracle(TokenTree(5, [0], 2), [prompt], causal_lm(tiny_llama()), random_reward, 0.3)

    def test_the_exact_gradient_reaches_the_weights_only_if_asked_for(self):
        model, tree = tiny_llama(), TokenTree(5, [0], 2)
        rewards = random_reward(PROMPT, tree.completions, tree.lengths)
        assert not tree.tabulate(causal_lm(model), PROMPT)[0].requires_grad
        logprobs = tree.completion_logprobs(tree.tabulate(causal_lm(model, requires_grad=True), PROMPT))
        objective(logprobs, logprobs.detach(), rewards, 0.1).backward()
        assert model.lm_head.weight.grad.abs().max() > 0


class TestTablePolicy:
    tree = TokenTree(4, [0, 2], 3)
    prompts = (torch.tensor([1, 2]), torch.tensor([3]))

    def test_it_starts_as_the_policy_it_is_given(self):
        reference = random_policy(4, 0)
        policy = TablePolicy(self.tree, self.prompts, reference)
        for prompt in self.prompts:
            for level in range(3):
                prefixes = self.tree.prefixes(level)
                assert torch.allclose(policy.logprob_fn(prompt, prefixes), reference(prompt, prefixes))

    def test_an_unknown_prompt_is_refused_with_those_it_has(self):
        with pytest.raises(ValueError, match=r"no prompt \[3, 3\], only \[\[1, 2\], \[3\]\]"):
            TablePolicy(self.tree, self.prompts).logprob_fn(torch.tensor([3, 3]), torch.empty(1, 0, dtype=torch.int64))

    def test_the_states_of_a_response_are_those_of_its_prefixes(self):
        policy = TablePolicy(self.tree, self.prompts, random_policy(4, 0))
        for number, prompt in enumerate(self.prompts):
            responses = self.tree.completions
            states = policy.states(torch.full((len(responses),), number), responses)
            steps = policy(states).gather(-1, responses[..., None])[..., 0]
            mask = torch.arange(3) < self.tree.lengths[:, None]
            expected = self.tree.completion_logprobs(self.tree.tabulate(random_policy(4, 0), prompt))
            assert torch.allclose((steps * mask).sum(1), expected)

    def test_without_a_start_it_is_uniform_and_its_gradient_is_exact(self):
        policy = TablePolicy(self.tree, self.prompts)
        assert torch.allclose(policy(torch.arange(4)), torch.tensor(0.25, dtype=torch.float64).log())
        oracle = Oracle(self.tree, self.prompts, policy.logprob_fn, random_reward, beta=0.3)
        objective(oracle.logprobs(policy.logprob_fn), oracle.ref_logprobs, oracle.rewards, 0.3).mean().backward()
        assert policy.logits.grad.abs().max() > 0


@pytest.mark.parametrize("problem", small_problems(), ids=lambda problem: problem.name)
class TestProblems:
    def test_the_environment_pays_what_the_oracle_knows(self, problem):
        env = problem.env(4, reward_mode="deferred", copy=False)
        rng = np.random.default_rng(0)
        _, info = env.reset(seed=0, options={"max_episodes": 20})
        while info["active"].any():
            *_, info = env.step(rng.integers(0, problem.tree.vocab_size, 4))
        rewards = problem.oracle(0.1).rewards
        for episode in env.pop_episodes():
            row = problem.tree.index(episode.response_ids)
            assert episode.reward == rewards[episode.prompt_index, row].item()

    def test_rewards_lie_between_0_and_1_and_differ(self, problem):
        rewards = problem.oracle(0.1).rewards
        assert rewards.min() >= 0 and rewards.max() <= 1 and rewards.std() > 0.05

    def test_its_size_is_within_the_promise(self, problem):
        assert 3 <= problem.tree.vocab_size <= 8 and 3 <= problem.tree.max_new_tokens <= 8


def test_the_trap_pays_less_under_the_reference_where_the_best_completion_begins():
    problem = trap_problem()
    oracle = problem.oracle(0.1)
    first = policy_values(problem.tree, oracle.ref_tables[0], oracle.ref_tables[0], oracle.rewards[0], 0.0)
    after_1, after_2 = first.action_values[0][0, 1:].tolist()
    best = problem.tree.completions[oracle.rewards[0].argmax()]
    assert best.tolist() == [2] * 6
    assert after_2 < after_1 - 0.3  # greedy in the reference's values takes token 1


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
