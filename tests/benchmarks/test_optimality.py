"""Every algorithm reaches the optimum that theory gives; the learners are those of the benchmarks."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import workload
from benchmarks.optimality import BETAS, print_table
from benchmarks.siblings import SIBLINGS
from benchmarks.table_ppo import learn_ppo
from benchmarks.table_preferences import (
    calibration_error,
    exact_pairs,
    expected_kl,
    gathered,
    implicit_reward_correlation,
    kl_to,
    labelled_loss,
    learn_preferences,
    learn_reward_model,
    sampled_pairs,
)
from benchmarks.words import (
    ITERATIONS,
    PROMPT,
    SHAPE,
    all_pairs,
    is_sentence,
    learn_dpo_module,
    learn_ppo_module,
    learn_reward_module,
    make_reference,
    middle_of,
    word_problem,
)
from benchmarks.words_trl import TableReward
from benchmarks.workload import EOS, FIRST_WORD, PAD
from lit_rlhf.engine.packing import Example, pack
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
from lit_rlhf.oracle import (
    Evaluation,
    TablePolicy,
    bayes_accuracy,
    causal_lm,
    kl_divergence,
    random_problem,
    small_problems,
)

PROBLEMS = {problem.name: problem for problem in small_problems()}
EVERYWHERE = [pytest.param(name, beta, marks=pytest.mark.slow) for name in PROBLEMS for beta in BETAS]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are so small that threads would mostly wait for one another, for minutes on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class TestPPO:
    @pytest.mark.parametrize(
        ("name", "beta", "seed", "scale"),
        [
            ("trap", 0.1, 0, {"iterations": 20, "rollout_size": 4096}),
            *(pytest.param(*at.values, seed, {}, marks=pytest.mark.slow) for at in EVERYWHERE for seed in (0, 1)),
        ],
    )
    def test_it_reaches_the_optimum(self, name, beta, seed, scale):
        policy = learn_ppo(PROBLEMS[name], beta, seed=seed, **scale)
        evaluation = PROBLEMS[name].oracle(beta).evaluate(policy.logprob_fn)
        assert evaluation.gap <= 0.005
        assert evaluation.kl_to_optimum <= 0.01


class TestDPO:
    @pytest.mark.parametrize(("name", "beta"), [("trap", 0.05), ("wide", 0.1), ("trap", 1.0), *EVERYWHERE])
    def test_on_exact_preferences_it_reaches_the_optimum_and_its_implicit_reward_is_the_reward(self, name, beta):
        oracle = PROBLEMS[name].oracle(beta)
        policy = learn_preferences(PROBLEMS[name], oracle, dpo_loss, exact_pairs(oracle))
        evaluation = oracle.evaluate(policy.logprob_fn)
        assert evaluation.gap <= 0.005
        assert evaluation.kl_to_optimum <= 1e-6
        assert implicit_reward_correlation(oracle, policy) >= 0.99

    def test_on_sampled_pairs_it_errs_as_much_as_statistics_allow_and_no_more(self):
        problem = random_problem(3, 3)
        oracle = problem.oracle(0.5)
        for count in (2_000, 32_000):
            errors = []
            for seed in range(8):
                pairs = gathered(sampled_pairs(oracle, count, seed))
                policy = learn_preferences(problem, oracle, dpo_loss, pairs, steps=100)
                errors.append(oracle.evaluate(policy.logprob_fn).kl_to_optimum)
            # 2 KL/E[KL] of each seed is about χ²/14 of 14 degrees of freedom: the mean of 8 has a spread of 0.13.
            assert 0.6 < np.mean(errors) / expected_kl(oracle, count) < 1.4

    @pytest.mark.parametrize("beta", [0.1, 1.0])
    def test_chosen_logprobs_fall_by_what_theory_says(self, beta):
        oracle = PROBLEMS["trap"].oracle(beta)
        policy = learn_preferences(PROBLEMS["trap"], oracle, dpo_loss, exact_pairs(oracle))
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

        def gradient(pairs, weights):
            logprobs = oracle.logprobs(policy.logprob_fn)
            losses = labelled_loss(dpo_loss, logprobs, oracle, pairs)
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
                (name, "random", 0.05) for name in ("conservative_dpo", "exo_pair", "jensen_shannon_dpo")
            ),  # the hard ones
            *(pytest.param(name, *at.values, marks=pytest.mark.slow) for name in SIBLINGS for at in EVERYWHERE),
        ],
    )
    def test_each_reaches_the_optimum_that_it_states(self, name, problem, beta):
        sibling, oracle = SIBLINGS[name], PROBLEMS[problem].oracle(beta)
        policy, own = sibling.learn(PROBLEMS[problem], oracle), sibling.own_optimum(oracle)
        assert own.exp().sum(1).allclose(torch.ones((), dtype=torch.float64))
        assert kl_to(oracle, policy, own) <= 0.001

    def test_the_optima_differ(self):
        oracle = PROBLEMS["trap"].oracle(0.5)
        own = {name: sibling.optimum(oracle) for name, sibling in SIBLINGS.items() if sibling.optimum}
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("words")


@pytest.fixture(scope="module")
def words(folder):
    make_reference(folder)
    return word_problem(folder)


class TestModules:
    """The LightningModules themselves, through the Trainer, on a tiny Llama whose completions can be listed."""

    @pytest.mark.parametrize(
        ("beta", "iterations", "gap", "kl"),
        [
            (0.1, 30, 0.02, 0.1),
            pytest.param(0.1, ITERATIONS, 0.005, 0.01, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
            pytest.param(0.5, ITERATIONS, 0.005, 0.01, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
        ],
    )
    def test_ppo_through_the_trainer_reaches_the_optimum(self, words, folder, beta, iterations, gap, kl):
        module = learn_ppo_module(words, folder, beta, iterations)
        evaluation = words.oracle(beta).evaluate(causal_lm(module.policy.model))
        assert evaluation.gap <= gap
        assert evaluation.kl_to_optimum <= kl

    @pytest.mark.parametrize(("copies", "slope_error"), [(40, 0.15), pytest.param(80, 0.1, marks=pytest.mark.slow)])
    def test_the_implicit_reward_of_dpo_through_the_trainer_is_the_reward(self, words, folder, copies, slope_error):
        beta, tree = 0.5, words.tree
        compared = is_sentence(tree) & (tree.completions == EOS).any(1)
        oracle = words.oracle(beta)
        module = learn_dpo_module(folder, all_pairs(words, compared, copies), beta, epochs=16)
        implicit = beta * (oracle.logprobs(causal_lm(module.policy.model)) - oracle.ref_logprobs)[0, compared]
        rewards = oracle.rewards[0, compared]
        assert torch.corrcoef(torch.stack([implicit, rewards]))[0, 1] >= 0.99
        assert np.polyfit(rewards.numpy(), implicit.numpy(), 1)[0] == pytest.approx(1, abs=slope_error)

    @pytest.mark.slow
    @pytest.mark.parametrize("order", [0, 1])
    @pytest.mark.parametrize(("beta", "kl"), [(0.1, 0.1), (0.5, 0.01)])
    def test_dpo_through_the_trainer_comes_near_the_optimum_in_whatever_order_the_pairs_come(
        self, words, folder, beta, kl, order
    ):
        oracle = words.oracle(beta)
        module = learn_dpo_module(folder, all_pairs(words, is_sentence(words.tree)), beta, seed=order)
        logprobs = oracle.logprobs(causal_lm(module.policy.model))
        assert kl_divergence(logprobs, oracle.optimal_logprobs).item() <= kl

    @pytest.mark.slow  # ten copies leave the correlation to chance: 0.86 to 0.97 over seeds and processors
    def test_the_reward_model_through_the_trainer_recovers_the_reward_and_is_calibrated(self, words, folder):
        oracle, tree, compared = words.oracle(0.1), words.tree, is_sentence(words.tree)
        module = learn_reward_module(folder, all_pairs(words, compared, copies=60))
        responses = [row[:length].numpy() for row, length in zip(tree.completions, tree.lengths, strict=True)]
        packed = pack([Example(np.array(PROMPT), (response,)) for response in responses])
        with torch.no_grad():
            scores = module.reward_model(packed, packed.last_nodes).double()
        learnt, true = scores[compared], oracle.rewards[0, compared]
        assert torch.corrcoef(torch.stack([learnt, true]))[0, 1] >= 0.99
        assert (learnt - true - (learnt - true).mean()).abs().max() <= 0.15
        assert calibration_error(oracle, scores[None]) <= 0.03
        assert calibration_error(oracle, 3 * scores[None]) > 0.03  # too sure of itself

    def test_a_llama_that_has_seen_one_token_alone_cannot_tell_how_often(self):
        # Why the prompt holds two: attention averages equal values, however its rotary scores weigh them.
        policy = causal_lm(workload.make_model(SHAPE))
        once, thrice = (policy(torch.tensor([FIRST_WORD]), torch.full((1, n), FIRST_WORD)) for n in (0, 2))
        assert torch.allclose(once, thrice, atol=1e-6)
        apart = [policy(torch.tensor(PROMPT), torch.full((1, n), FIRST_WORD)) for n in (0, 2)]
        assert not torch.allclose(*apart, atol=1e-3)

    def test_the_peer_is_paid_for_each_completion_at_its_last_token_what_ours_is(self, words):
        tree, rewards = words.tree, words.reward_fn(words.prompts[0], None, None)
        ended = torch.arange(tree.max_new_tokens) >= tree.lengths[:, None]
        texts = [" ".join(map(str, row[:n])) for row, n in zip(tree.completions.tolist(), tree.lengths, strict=True)]
        table = TableReward(len(PROMPT), dict(zip(texts, rewards.tolist(), strict=True)))
        ids = torch.cat([torch.tensor(PROMPT).repeat(len(ended), 1), tree.completions.masked_fill(ended, PAD)], dim=1)
        mask = torch.cat([torch.ones(len(ended), len(PROMPT), dtype=torch.bool), ~ended], dim=1)
        paid = table.score(table.backbone(input_ids=ids, attention_mask=mask).hidden_states[-1])
        last = len(PROMPT) + tree.lengths - 1
        assert torch.equal(paid[torch.arange(len(last)), last, 0], rewards.float())


def test_of_several_seeds_a_line_holds_the_one_in_the_middle_and_the_range_of_all():
    runs = [Evaluation(0.0, 0.0, 0.0, gap, kl) for gap, kl in ((0.5, 0.75), (0.25, 0.125), (0.0, 1.0))]
    line = middle_of(runs)
    assert line["gap"] == 0.5 and line["kl_to_optimum"] == 0.75 and line["seeds"] == 3
    assert line["gap_range"] == [0.0, 0.5] and line["kl_range"] == [0.125, 1.0]


def test_the_table_shows_the_worst_mdp_of_each_algorithm_and_beta(capsys):
    lines = [("random", 0.25, 0.125), ("trap", 0.5, 0.0625)]
    rows = [{"algorithm": "ppo", "mdp": mdp, "beta": 0.1, "gap": gap, "kl_to_optimum": kl} for mdp, gap, kl in lines]
    print_table([*rows, rows[0] | {"algorithm": "ipo", "optimum": "own"}], ("ppo", "ipo"))
    said = capsys.readouterr().out
    assert "50.000% | 0.12500" in said and "own | 0.12500" in said
