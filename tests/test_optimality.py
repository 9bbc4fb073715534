"""Every algorithm reaches the optimum that theory gives; the learners are those of benchmarks/optimality.py."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.optimality import (
    BETAS,
    SIBLINGS,
    calibration_error,
    exact_pairs,
    expected_kl,
    gathered,
    implicit_reward_correlation,
    kl_to,
    labelled_loss,
    learn_ppo,
    learn_preferences,
    learn_reward_model,
    sampled_pairs,
)
from lit_rlhf import DPO, PPO, FixedKL, PreferenceDataModule, RolloutDataModule
from lit_rlhf.losses import (
    bco_pair_loss,
    conservative_dpo_loss,
    dpo_loss,
    exo_pair_loss,
    hinge_loss,
    ipo_loss,
    nca_pair_loss,
    sppo_hard_loss,
)
from lit_rlhf.oracle import Oracle, TablePolicy, TokenTree, bayes_accuracy, causal_lm, random_problem, small_problems
from lit_rlhf.rewards import Reward
from tests.stages import make_trainer

PROBLEMS = {problem.name: problem for problem in small_problems()}
EVERYWHERE = [pytest.param(name, beta, marks=pytest.mark.slow) for name in PROBLEMS for beta in BETAS]


class TestPPO:
    @pytest.mark.parametrize(
        ("name", "beta", "iterations"),
        [("trap", 0.1, 150), *(pytest.param(*where.values, 400, marks=pytest.mark.slow) for where in EVERYWHERE)],
    )
    def test_it_reaches_the_optimum(self, name, beta, iterations):
        policy = learn_ppo(PROBLEMS[name], beta, iterations)
        evaluation = PROBLEMS[name].oracle(beta).evaluate(policy.logprob_fn)
        assert evaluation.gap <= 0.005
        assert evaluation.kl_to_optimum <= 0.01


class TestDPO:
    @pytest.mark.parametrize(("name", "beta"), [("trap", 0.05), ("wide", 0.1), ("trap", 1.0), *EVERYWHERE])
    def test_on_exact_preferences_it_reaches_the_optimum_and_its_implicit_reward_is_the_reward(self, name, beta):
        oracle = PROBLEMS[name].oracle(beta)
        policy = learn_preferences(PROBLEMS[name], oracle, dpo_loss, exact_pairs(oracle), beta)
        evaluation = oracle.evaluate(policy.logprob_fn)
        assert evaluation.gap <= 0.005
        assert evaluation.kl_to_optimum <= 0.01
        assert implicit_reward_correlation(oracle, policy) >= 0.99

    def test_on_sampled_pairs_it_errs_as_much_as_statistics_allow_and_no_more(self):
        problem = random_problem(3, 3)
        oracle = problem.oracle(0.5)
        for count in (2_000, 32_000):
            errors = []
            for seed in range(8):
                pairs = gathered(sampled_pairs(oracle, count, seed))
                policy = learn_preferences(problem, oracle, dpo_loss, pairs, 0.5, steps=100)
                errors.append(oracle.evaluate(policy.logprob_fn).kl_to_optimum)
            # 2 KL/E[KL] of each seed is about χ²/14 of 14 degrees of freedom: the mean of 8 has a spread of 0.13.
            assert 0.6 < np.mean(errors) / expected_kl(oracle, count) < 1.4

    @pytest.mark.parametrize("beta", [0.1, 1.0])
    def test_chosen_logprobs_fall_by_what_theory_says(self, beta):
        oracle = PROBLEMS["trap"].oracle(beta)
        policy = learn_preferences(PROBLEMS["trap"], oracle, dpo_loss, exact_pairs(oracle), beta)
        with torch.no_grad():
            logratios = (oracle.logprobs(policy.logprob_fn) - oracle.ref_logprobs)[0]
        pairs = sampled_pairs(oracle, 200_000)
        chosen = torch.where(pairs.first_wins == 1, pairs.first, pairs.second)
        expected = (oracle.rewards[0, chosen].mean() - beta * oracle.log_partition[0]) / beta
        assert logratios[chosen].mean().item() == pytest.approx(expected.item(), abs=1e-4)
        assert logratios[chosen].mean().item() == pytest.approx({0.1: -2.02, 1.0: -0.00}[beta], abs=0.05)

    def test_its_gradient_on_sampled_pairs_is_unbiased(self):
        problem = PROBLEMS["trap"]
        oracle = problem.oracle(0.3)
        policy = TablePolicy(problem.tree, problem.prompts)
        with torch.no_grad():
            policy.logits.normal_(generator=torch.Generator().manual_seed(0))
        lengths = problem.tree.lengths.double()

        def gradient(pairs, weights):
            logprobs = oracle.logprobs(policy.logprob_fn)
            losses = labelled_loss(dpo_loss, logprobs, oracle.ref_logprobs, pairs, 0.3, lengths)
            return torch.autograd.grad((weights * losses).sum(), policy.logits)[0].flatten()

        everyone = exact_pairs(oracle, None)
        reference = oracle.ref_logprobs[0].exp()
        exact = gradient(everyone, 2 * reference[everyone.first] * reference[everyone.second])
        batches = [sampled_pairs(oracle, 256, seed) for seed in range(300)]
        sampled = torch.stack([gradient(pairs, pairs.weight) for pairs in batches])
        mean = sampled.mean(0)
        assert torch.cosine_similarity(mean, exact, dim=0) >= 0.99
        along = sampled @ exact / exact.square().sum()  # 1 in the mean
        assert abs(along.mean().item() - 1) < 3 * along.std().item() / math.sqrt(len(batches))
        moving = sampled.std(0) > 1e-12
        z_scores = ((mean - exact) / sampled.std(0).clamp(min=1e-12) * math.sqrt(len(batches)))[moving]
        assert z_scores.square().mean().sqrt() < 1.3  # 1 if unbiased


class TestSiblings:
    @pytest.mark.parametrize(
        ("name", "problem", "beta"),
        [
            *((name, "trap", 0.5) for name in SIBLINGS if name != "dpo"),
            *(
                pytest.param(name, problem, beta, marks=pytest.mark.slow)
                for name in SIBLINGS
                for problem in PROBLEMS
                for beta in BETAS
                if beta >= 0.5 or SIBLINGS[name].steps == 150  # else too ill-conditioned for L-BFGS
            ),
        ],
    )
    def test_each_reaches_the_optimum_that_it_states(self, name, problem, beta):
        sibling, oracle = SIBLINGS[name], PROBLEMS[problem].oracle(beta)
        pairs = exact_pairs(oracle, None if sibling.all_pairs else 16).flipped(sibling.flipped)
        policy = learn_preferences(PROBLEMS[problem], oracle, sibling.loss, pairs, beta)
        own = oracle.optimal_logprobs if sibling.optimum is None else sibling.optimum(oracle, beta)
        assert own.exp().sum(1).allclose(torch.ones((), dtype=torch.float64))
        assert kl_to(oracle, policy, own) <= 0.01

    def test_the_optima_differ(self):
        oracle = PROBLEMS["trap"].oracle(0.5)
        own = {name: sibling.optimum(oracle, 0.5) for name, sibling in SIBLINGS.items() if sibling.optimum}
        for name, logprobs in own.items():
            kl = (logprobs.exp() * (logprobs - oracle.optimal_logprobs)).sum().item()
            assert kl > 0.001, name

    @pytest.mark.parametrize(
        ("loss", "margin", "learning_rate"),  # margin of the implicit rewards, with sure labels
        [
            (partial(conservative_dpo_loss, label_smoothing=0.1), math.log(9), 1.0),
            (partial(exo_pair_loss, label_smoothing=0.1), math.log(9), 1.0),
            (hinge_loss, 1.0, 0.02),
            (ipo_loss, 0.5, 0.05),
        ],
        ids=["cdpo", "exo", "hinge", "ipo"],
    )
    def test_losses_with_a_target_margin_stop_there(self, loss, margin, learning_rate):
        # Two completions, the first always preferred: a policy can take any margin.
        beta, logits = 0.4, torch.zeros(2, dtype=torch.float64, requires_grad=True)
        reference = torch.tensor([0.3, 0.7], dtype=torch.float64).log()
        optimizer = torch.optim.SGD([logits], lr=learning_rate)
        for _ in range(500):
            logprobs = torch.log_softmax(logits, 0)
            optimizer.zero_grad()
            loss(logprobs[:1], logprobs[1:], reference[:1], reference[1:], beta).sum().backward()
            optimizer.step()
        chosen, rejected = (beta * (torch.log_softmax(logits, 0) - reference)).tolist()
        assert chosen - rejected == pytest.approx(margin, abs=0.01)

    @pytest.mark.parametrize(
        ("loss", "implicit_reward"),  # as a function of the probability p that a response beats another one
        [
            (bco_pair_loss, lambda p: torch.logit(p)),  # P(chosen | y), a classifier's log-odds
            (sppo_hard_loss, lambda p: p - 0.5),
            (nca_pair_loss, lambda p: torch.log(2 * p)),  # σ = p/(p + ½)
        ],
        ids=["bco", "sppo", "nca"],
    )
    def test_losses_that_rate_each_response_give_it_its_win_rate(self, loss, implicit_reward):
        # Free log-ratios, since these optima are not normalised; all pairs with their Bradley-Terry probabilities.
        rewards, beta = torch.tensor([0.0, 0.4, 1.3, 2.0], dtype=torch.float64), 0.5
        first, second = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T
        wins = (rewards[first] - rewards[second]).sigmoid()
        logratios = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([logratios], max_iter=100, line_search_fn="strong_wolfe")

        def mean_loss():
            optimizer.zero_grad()
            zeros = torch.zeros(16, dtype=torch.float64)
            losses = wins * loss(logratios[first], logratios[second], zeros, zeros, beta)
            losses.mean().backward()
            return losses.mean()

        optimizer.step(mean_loss)
        win_rates = (rewards[:, None] - rewards).sigmoid().mean(1)
        assert torch.allclose(beta * logratios.detach(), implicit_reward(win_rates), atol=1e-3)


class TestRewardModel:
    @pytest.mark.parametrize("name", ["trap", *(pytest.param(name, marks=pytest.mark.slow) for name in PROBLEMS)])
    def test_it_recovers_the_reward_up_to_a_constant_per_prompt(self, name):
        oracle = PROBLEMS[name].oracle(0.1)
        error = learn_reward_model(oracle, exact_pairs(oracle)) - oracle.rewards
        assert (error - error.mean(1, keepdim=True)).abs().max() < 1e-3

    def test_it_is_calibrated_on_held_out_preferences_and_as_accurate_as_can_be(self):
        problem = random_problem(3, 3)
        oracle = problem._replace(reward_fn=lambda *args: 3 * problem.reward_fn(*args)).oracle(0.1)
        scores = learn_reward_model(oracle, gathered(sampled_pairs(oracle, 50_000)))
        assert calibration_error(oracle, scores) <= 0.03
        assert calibration_error(oracle, 3 * scores) > 0.03  # too sure of itself
        held_out = sampled_pairs(oracle, 50_000, seed=1)
        first, second = (scores[held_out.prompt, which] for which in (held_out.first, held_out.second))
        right = torch.where(first == second, 0.5, ((first > second) == (held_out.first_wins == 1)).double())
        true = [oracle.rewards[held_out.prompt, which] for which in (held_out.first, held_out.second)]
        assert right.mean().item() == pytest.approx(bayes_accuracy(*true).item(), abs=0.01)


class TreeReward(Reward):
    """Rewards of token ids by a function of the oracle."""

    def __init__(self, tree, reward_fn):
        self.tree, self.reward_fn = tree, reward_fn

    def __call__(self, prompts, responses, **columns):
        rewards = self.reward_fn(None, self.tree.completions, self.tree.lengths)
        return np.array([rewards[self.tree.index(response)].item() for response in responses])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimality")
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "c": 5}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=8, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=6, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "prompts.jsonl").write_text('{"prompt": "a"}\n' * 64)
    return folder


class TestModules:
    """The LightningModules themselves, on a model small enough to enumerate: vocabulary 6, completions of up to 3."""

    @staticmethod
    def reward_fn(prompt_ids, completions, lengths):
        """Likes b, dislikes <pad> and <s>, and b after a most of all."""
        value = torch.tensor([-0.3, -0.3, 0.0, 0.1, 0.3, 0.0], dtype=torch.float64)
        mask = torch.arange(completions.shape[1]) < lengths[:, None]
        pairs = ((completions[:, :-1] == 3) & (completions[:, 1:] == 4)).sum(1)
        return (value[completions] * mask).sum(1) + 0.4 * pairs

    def oracle(self, policy, beta):
        model = policy.policy.model
        return Oracle(TokenTree(6, [2], 3), [torch.tensor([3])], causal_lm(model), self.reward_fn, beta)

    def test_ppo_through_the_trainer(self, folder, tmp_path):
        torch.manual_seed(0)
        beta = 0.3
        module = PPO(
            str(folder), kl=FixedKL(beta), learning_rate=6e-3, lr_scheduler="linear", ppo_epochs=2, num_minibatches=2,
            value_coef=0.5, gae_lambda=0.9,
        )  # fmt: skip
        oracle = self.oracle(module, beta)
        reward = TreeReward(oracle.tree, self.reward_fn)
        prompts = str(folder / "prompts.jsonl")
        sizes = {"rollout_size": 256, "num_slots": 128, "max_new_tokens": 3}
        data = RolloutDataModule(reward, train=prompts, validation=None, tokenizer=module.tokenizer, **sizes)
        make_trainer(tmp_path, max_epochs=60).fit(module, data)
        evaluation = oracle.evaluate(causal_lm(module.policy.model))
        assert evaluation.gap < 0.1
        assert evaluation.kl_to_optimum < 0.1

    def test_dpo_through_the_trainer(self, folder, tmp_path):
        torch.manual_seed(0)
        beta, rng = 0.5, np.random.default_rng(0)
        module = DPO(str(folder), beta=beta, learning_rate=1e-2, lr_scheduler="linear")
        oracle = self.oracle(module, beta)
        words = {3: "a", 4: "b", 5: "c"}
        listed = zip(oracle.tree.completions.tolist(), oracle.tree.lengths.tolist(), strict=True)
        rows = {row: y[: n - 1] for row, (y, n) in enumerate(listed) if n > 1 and y[n - 1] == 2 and min(y[: n - 1]) > 2}
        numbers = sorted(rows)
        assert len(numbers) == 3 + 9  # one or two words and the end token
        rewards, lines = oracle.rewards[0], []
        for first in numbers:
            for second in numbers:
                wins = rng.random(30) < (2 * (rewards[first] - rewards[second])).sigmoid().item()
                for win in wins if first != second else ():
                    pair = (first, second) if win else (second, first)
                    chosen, rejected = (" " + " ".join(words[token] for token in rows[row]) for row in pair)
                    lines.append(json.dumps({"prompt": "a", "chosen": chosen, "rejected": rejected}) + "\n")
        (folder / "pairs.jsonl").write_text("".join(lines))
        data = PreferenceDataModule(
            train=str(folder / "pairs.jsonl"), validation=None, max_tokens=512, tokenizer=module.tokenizer
        )
        make_trainer(tmp_path, max_epochs=3).fit(module, data)
        with torch.no_grad():
            implicit = beta * (oracle.logprobs(causal_lm(module.policy.model)) - oracle.ref_logprobs)[0, numbers]
        expected = 2 * rewards[numbers]  # the reward that the labels were drawn by
        correlation = np.corrcoef(implicit.numpy(), expected.numpy())[0, 1]
        slope = np.polyfit(expected.numpy(), implicit.numpy(), 1)[0]
        assert (correlation, slope) == (pytest.approx(1, abs=0.1), pytest.approx(1, abs=0.3))
