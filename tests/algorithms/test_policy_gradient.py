"""The gradients that PPO and REINFORCE estimate, against the exact one by enumeration of all completions.

A table policy over 15 completions: the expectation of an estimator is a sum over completions, without sampling.
"""

import json
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from lit_rlhf import PPO, FixedKL, KLPenalty, RolloutDataModule, TextReward
from lit_rlhf.losses import (
    PolicyTokens,
    dr_grpo,
    grpo,
    policy_gradient_loss,
    ppo_policy_loss,
    reinforce,
    reinforce_plus_plus,
    remax,
    rloo,
)
from lit_rlhf.losses.advantages import ScoredRollout, gae, token_rewards, whiten
from lit_rlhf.losses.kl import k1
from lit_rlhf.oracle import TokenTree, causal_lm, kl_divergence, objective, optimal_logprobs, policy_values
from tests.tiny import EOS, VOCABULARY, save_tiny

BETA = 0.3


class Task(NamedTuple):
    """A token MDP and a table policy, with gradients by its logits."""

    tree: TokenTree
    logits: torch.Tensor  # (states, V), level after level
    ref_table: list[torch.Tensor]
    rewards: torch.Tensor  # (C,)

    def table(self, logits):
        sizes = [self.tree.num_prefixes(level) for level in range(self.tree.max_new_tokens)]
        return list(torch.log_softmax(logits, dim=-1).split(sizes))

    @property
    def mask(self):
        """(C, T) response tokens."""
        return torch.arange(self.tree.max_new_tokens) < self.tree.lengths[:, None]

    @property
    def probabilities(self):
        """(C,) of the completions."""
        return self.tree.completion_logprobs(self.table(self.logits)).exp().detach()

    def exact_gradient(self):
        """Of J(π) = E[r] - β KL(π‖π_ref), flattened."""
        logits = self.logits.clone().requires_grad_()
        logprobs, ref_logprobs = (self.tree.completion_logprobs(t) for t in (self.table(logits), self.ref_table))
        objective(logprobs, ref_logprobs, self.rewards, BETA).backward()
        return logits.grad.flatten()

    def gradients(self, losses_of):
        """(C, parameters) minus the gradient of each completion's loss: what it contributes when it is sampled."""
        rows = []
        for i in range(self.tree.num_completions):
            logits = self.logits.clone().requires_grad_()
            losses_of(self.tree.along(self.table(logits)))[i].sum().backward()
            rows.append(-logits.grad.flatten())
        return torch.stack(rows)


def make_task(max_new_tokens=3):
    generator = torch.Generator().manual_seed(3)
    tree = TokenTree(vocab_size=3, stop_ids=[0], max_new_tokens=max_new_tokens)
    states = sum(tree.num_prefixes(level) for level in range(max_new_tokens))
    logits, ref_logits = torch.randn(2, states, 3, generator=generator, dtype=torch.float64)
    rewards = torch.randn(tree.num_completions, generator=generator, dtype=torch.float64)
    task = Task(tree, logits, [], rewards)
    return task._replace(ref_table=task.table(ref_logits))


TASK = make_task()
RANDOM_VALUES = torch.randn(4, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def critic(kind):
    """(C, T) values of a critic: right, wrong or absent."""
    table = TASK.table(TASK.logits)
    values = policy_values(TASK.tree, table, TASK.ref_table, TASK.rewards, BETA).values
    if kind == "wrong":
        values = [RANDOM_VALUES[: len(level), 0] * 3 for level in values]
    if kind == "none":
        values = [torch.zeros_like(level) for level in values]
    return TASK.tree.along(values)


def ppo_losses(gae_lambda, kind, task=TASK):
    """Losses of all completions by the library's own parts, KL in the reward."""
    old_logprobs = task.tree.along(task.table(task.logits))
    kl = k1(old_logprobs, task.tree.along(task.ref_table))
    rewards = token_rewards(task.rewards, kl, BETA, task.mask)
    advantages, _ = gae(ScoredRollout(rewards, critic(kind), task.mask), 1.0, gae_lambda)
    return lambda logprobs: ppo_policy_loss(PolicyTokens(logprobs, old_logprobs, advantages), 0.2).losses * task.mask


def reinforce_losses(baseline=0.0):
    """-(r - β log π/π_ref - b) log π(y|x): the whole response as one action, paid by its score and whole KL."""
    old_logprobs = TASK.tree.along(TASK.table(TASK.logits))
    returns = TASK.rewards - BETA * k1(old_logprobs, TASK.tree.along(TASK.ref_table)).sum(1)
    return lambda logprobs: -(returns - baseline) * logprobs.sum(1)


ESTIMATORS = {
    "PPO, λ = 1, no critic": ppo_losses(1.0, "none"),
    "PPO, λ = 1, any critic": ppo_losses(1.0, "wrong"),
    "PPO, λ = 0.95, right critic": ppo_losses(0.95, "right"),
    "PPO, λ = 0, right critic": ppo_losses(0.0, "right"),
    "REINFORCE": reinforce_losses(),
    "REINFORCE with a baseline": reinforce_losses(baseline=0.4),
}


def family_losses(estimator, share=1.0):
    """-A log π with the advantages that a response has in the mean over the other one of its group of two.

    `share` is that of the gradient which the estimator has.
    """
    C, old_logprobs = TASK.tree.num_completions, TASK.tree.along(TASK.table(TASK.logits))
    kl = k1(old_logprobs, TASK.tree.along(TASK.ref_table))
    rewards = token_rewards(TASK.rewards, kl, BETA, TASK.mask)
    pairs = torch.cartesian_prod(torch.arange(C), torch.arange(C)).T.flatten()  # all first ones, then all second ones
    greedy = TASK.rewards[TASK.probabilities.argmax()].expand(2 * C * C)
    groups, mean = torch.arange(C * C).repeat(2), torch.tensor(0.4, dtype=torch.float64)
    rollout = ScoredRollout(rewards[pairs], None, TASK.mask[pairs], TASK.rewards[pairs], None, groups, mean, greedy)
    advantages = estimator(rollout).advantages[: C * C].view(C, C, -1)
    expected = (TASK.probabilities[:, None] * advantages).sum(1) / share
    return lambda logprobs: policy_gradient_loss(PolicyTokens(logprobs, old_logprobs, expected)).losses * TASK.mask


ESTIMATORS |= {
    "REINFORCE, reward to go": family_losses(partial(reinforce, baseline="none")),
    "REINFORCE, running mean": family_losses(reinforce),
    "RLOO": family_losses(rloo),
    "Dr. GRPO, half of it": family_losses(dr_grpo, share=0.5),  # (G - 1)/G with G = 2
    "REINFORCE++, not whitened": family_losses(reinforce_plus_plus),
    "ReMax": family_losses(remax),
}


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


@pytest.mark.parametrize("losses", ESTIMATORS.values(), ids=ESTIMATORS)
def test_the_expectation_over_all_completions_is_the_exact_gradient(losses):
    expectation = TASK.probabilities @ TASK.gradients(losses)
    torch.testing.assert_close(expectation, TASK.exact_gradient())


@pytest.mark.parametrize("losses", ESTIMATORS.values(), ids=ESTIMATORS)
def test_samples_are_unbiased_within_three_standard_errors_and_point_the_same_way(losses):
    N = 50_000
    generator = torch.Generator().manual_seed(0)
    gradients = TASK.gradients(losses)[torch.multinomial(TASK.probabilities, N, True, generator=generator)]
    exact, error = TASK.exact_gradient(), gradients.std(dim=0) / N**0.5
    assert cosine(gradients.mean(dim=0), exact) >= 0.99
    # 21 coordinates by 3 standard errors: one in 20 runs would miss one by chance; this seed does not.
    assert ((gradients.mean(dim=0) - exact).abs() <= 3 * error + 1e-12).all()


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5])
def test_below_lambda_1_a_wrong_critic_biases_the_gradient(gae_lambda):
    expectation = TASK.probabilities @ TASK.gradients(ppo_losses(gae_lambda, "wrong"))
    assert not torch.allclose(expectation, TASK.exact_gradient(), atol=0.01)


def test_lambda_and_a_right_critic_take_variance_away():
    def variance(losses):
        gradients, p = TASK.gradients(losses), TASK.probabilities
        return (p @ (gradients - p @ gradients).square()).sum().item()

    with_critic = [variance(ppo_losses(gae_lambda, "right")) for gae_lambda in (0.0, 0.5, 1.0)]
    assert with_critic == sorted(with_critic)
    assert with_critic[-1] < min(variance(ppo_losses(1.0, "none")), variance(reinforce_losses()))


def test_whitened_advantages_and_the_mean_over_tokens_keep_the_direction():
    N = 50_000
    sampled = torch.multinomial(TASK.probabilities, N, True, generator=torch.Generator().manual_seed(1))
    old_logprobs = TASK.tree.along(TASK.table(TASK.logits))[sampled]
    mask = TASK.mask[sampled]
    kl = k1(old_logprobs, TASK.tree.along(TASK.ref_table)[sampled])
    rewards = token_rewards(TASK.rewards[sampled], kl, BETA, mask)
    advantages, _ = gae(ScoredRollout(rewards, critic("right")[sampled], mask), 1.0, 0.95)
    logits = TASK.logits.clone().requires_grad_()
    logprobs = TASK.tree.along(TASK.table(logits))[sampled]
    losses = ppo_policy_loss(
        PolicyTokens(logprobs[mask], old_logprobs[mask], whiten(advantages, mask)[mask]), 0.2
    ).losses
    losses.mean().backward()
    assert cosine(-logits.grad.flatten(), TASK.exact_gradient()) >= 0.99


def test_kl_in_the_loss_has_the_gradient_of_the_objective_where_a_response_is_one_token():
    task = make_task(max_new_tokens=1)
    old_logprobs, ref_logprobs = task.tree.along(task.table(task.logits)), task.tree.along(task.ref_table)
    penalty = KLPenalty("loss", "k3")

    def losses(logprobs):
        policy = ppo_policy_loss(PolicyTokens(logprobs, old_logprobs, task.rewards[:, None]), 0.2).losses
        return policy + BETA * penalty.loss(logprobs, old_logprobs, ref_logprobs)

    torch.testing.assert_close(task.probabilities @ task.gradients(losses), task.exact_gradient())


@pytest.mark.parametrize("old", [0.0, 0.3])  # how far the policy has left the one that was sampled from
def test_k2_of_whole_responses_in_the_loss_has_the_gradient_of_their_kl(old):
    tree, generator = TASK.tree, torch.Generator().manual_seed(2)
    away = TASK._replace(
        logits=TASK.logits + old * torch.randn(TASK.logits.shape, generator=generator, dtype=torch.float64)
    )
    C, mask = tree.num_completions, TASK.mask
    old_logprobs, ref_logprobs = tree.along(away.table(away.logits)), tree.along(TASK.ref_table)
    ids = torch.arange(C)[:, None].expand(mask.shape)[mask]

    def gradient(estimator):
        def losses(logprobs):
            terms = torch.zeros_like(logprobs)
            penalty = KLPenalty("loss", estimator)
            terms[mask] = penalty.loss(logprobs[mask], old_logprobs[mask], ref_logprobs[mask], ids)
            return terms

        return -(away.probabilities @ TASK.gradients(losses))

    logits = TASK.logits.clone().requires_grad_()
    logprobs, ref = (tree.completion_logprobs(t) for t in (TASK.table(logits), TASK.ref_table))
    kl_divergence(logprobs, ref).backward()
    torch.testing.assert_close(gradient("k2_sequence"), logits.grad.flatten())
    assert cosine(gradient("k2"), logits.grad.flatten()) < 0.999  # of each token: blind to what it leads to


@pytest.mark.parametrize("estimator", [rloo, grpo, dr_grpo])
def test_at_the_optimum_no_group_has_an_advantage_left(estimator):
    ref = TASK.tree.completion_logprobs(TASK.ref_table)
    best = optimal_logprobs(ref, TASK.rewards, BETA)
    kl = (best - ref)[:, None] * torch.ones(1, dtype=torch.float64)
    C = len(best)
    pairs = torch.cartesian_prod(torch.arange(C), torch.arange(C)).flatten()
    rewards = token_rewards(TASK.rewards, kl, BETA, torch.ones(C, 1, dtype=torch.bool))[pairs]
    rollout = ScoredRollout(
        rewards, None, torch.ones_like(rewards, dtype=torch.bool), group_index=torch.arange(C * C).repeat_interleave(2)
    )
    assert estimator(rollout).advantages.abs().max() < 1e-9


class FirstGradient(Callback):
    """Keeps the policy's gradient of the first step and ends the run."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradient = torch.cat([p.grad.flatten() for p in pl_module.policy.parameters()])


def test_the_first_step_of_the_whole_of_ppo_climbs_the_exact_gradient(tmp_path):
    """Environment, slot cache, sampling, packing, experience and loss against plain forward passes of transformers."""
    folder = save_tiny(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "w5 w17"}) + "\n")
    worth = np.random.default_rng(0).normal(size=VOCABULARY)

    def reward(prompts, responses, **columns):
        return [sum(worth[int(word[1:])] for word in response.split() if word[0] == "w") for response in responses]

    watch = FirstGradient()
    module = PPO(str(folder), kl=FixedKL(BETA), gae_lambda=1.0, ppo_epochs=1, num_minibatches=1)
    generator = torch.Generator().manual_seed(5)
    for parameter in module.frozen["reference"].parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    data = RolloutDataModule(
        TextReward(reward),
        train=str(tmp_path / "prompts.jsonl"),
        validation=None,
        tokenizer=module.tokenizer,
        rollout_size=4096,
        num_slots=512,
        max_new_tokens=2,
    )

    tree = TokenTree(VOCABULARY, [EOS], 2)
    prompt_ids = torch.tensor(module.tokenizer("w5 w17").input_ids)
    table = tree.tabulate(causal_lm(module.policy.model, requires_grad=True), prompt_ids)
    reference = tree.tabulate(causal_lm(module.frozen["reference"].model), prompt_ids)
    texts = [
        module.tokenizer.decode(ids[:n].tolist(), skip_special_tokens=True)
        for ids, n in zip(tree.completions, tree.lengths, strict=True)
    ]
    rewards = torch.tensor(reward([], texts), dtype=torch.float64)
    logprobs, ref_logprobs = tree.completion_logprobs(table), tree.completion_logprobs(reference)
    exact = torch.autograd.grad(objective(logprobs, ref_logprobs, rewards, BETA), module.policy.parameters())

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, callbacks=[watch], **quiet)
    trainer.fit(module, data)
    assert cosine(-watch.gradient.double(), torch.cat([g.flatten() for g in exact]).double()) >= 0.99
