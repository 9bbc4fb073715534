"""Methods on policy without a critic, each against the optimum that it states."""

import pytest
import torch

from benchmarks.table_family import FAMILY, learn_member
from benchmarks.words import make_reference, word_problem
from benchmarks.words_family import learn_family_module
from lit_rlhf import GRPO, RLOO
from lit_rlhf.oracle import causal_lm, kl_divergence, small_problems

PROBLEMS = {problem.name: problem for problem in small_problems()}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are so small that threads would mostly wait for one another, for minutes on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("member", "name", "beta", "scale"),
    [
        ("grpo", "trap", 0.1, {"iterations": 20, "rollout_size": 4096}),
        *(
            pytest.param(member, name, 0.1, {}, marks=[pytest.mark.slow, pytest.mark.timeout(900)])
            for member in FAMILY
            for name in ("random", "sparse", "trap")
        ),
    ],
)
def test_it_reaches_the_optimum(member, name, beta, scale):
    method = FAMILY[member]
    policy = learn_member(PROBLEMS[name], beta, method, **scale)
    evaluation = method.oracle(PROBLEMS[name], beta).evaluate(policy.logprob_fn)
    assert evaluation.gap <= 0.005
    assert evaluation.kl_to_optimum <= 0.01


def test_the_penalty_of_whole_responses_in_the_loss_weighs_more_beside_dr_grpo():
    # Else the test above would not tell its optimum from that of β itself.
    ours, theirs = (FAMILY[name].oracle(PROBLEMS["trap"], 0.1) for name in ("dr_grpo_kl_in_loss", "rloo"))
    assert ours.beta == pytest.approx(0.1 * 8 / 7)
    assert kl_divergence(ours.optimal_logprobs, theirs.optimal_logprobs).item() > 0.01


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("kind", "passes"), [(RLOO, 1), (GRPO, 2)])
def test_the_modules_through_the_trainer_reach_the_optimum(kind, passes, tmp_path):
    """On a tiny Llama whose completions can be listed, with the KL in the reward."""
    make_reference(tmp_path)
    words = word_problem(tmp_path)
    module = learn_family_module(kind, words, tmp_path, 0.5, num_minibatches=2, ppo_epochs=passes)
    evaluation = words.oracle(0.5).evaluate(causal_lm(module.policy.model))
    assert evaluation.gap <= 0.005
    assert evaluation.kl_to_optimum <= 0.01
