from dataclasses import replace

import pytest
import torch

from lit_rlhf.algorithms.preference import agreement, sequence_logprobs
from lit_rlhf.engine.packing import pack
from tests.stages import make_stage, make_trainer
from tests.tiny import plain_response_logprobs, random_examples, tiny_policy


def test_validation_metrics_are_means_over_pairs_not_over_batches(inputs, tmp_path):
    means = []
    for budget in (100, 10_000):
        module, data = make_stage("dpo", inputs)
        data.batches = replace(data.batches, max_tokens=budget)
        trainer = make_trainer(tmp_path, limit_val_batches=1.0)
        trainer.validate(module, data, verbose=False)
        means.append(trainer.callback_metrics["val/chosen_logprobs"].item())
    assert means[0] == pytest.approx(means[1], rel=1e-5)


def test_a_sequences_logprob_is_the_sum_over_its_response_of_the_plain_forward():
    policy, examples = tiny_policy(), random_examples(5, responses=2)
    chosen, rejected = sequence_logprobs(policy, pack(examples))
    for example, *ours in zip(examples, chosen, rejected, strict=True):
        for response, logprob in zip(example.responses, ours, strict=True):
            expected = plain_response_logprobs(policy.model, example.prompt_ids, response).sum()
            torch.testing.assert_close(logprob, expected, rtol=1e-4, atol=1e-4)


def test_a_tie_agrees_half_with_the_label():
    # margins 1, 0, -3, 2: right, tied, wrong, right
    scores = agreement(torch.tensor([2.0, 1.0, 0.0, 5.0]), torch.tensor([1.0, 1.0, 3.0, 3.0]))
    assert (scores["accuracy"].item(), scores["margin"].item()) == ((1 + 0.5 + 0 + 1) / 4, 0.0)


def test_agreement_carries_no_gradient():
    chosen = torch.ones(3, requires_grad=True)
    assert not any(value.requires_grad for value in agreement(chosen, torch.zeros(3)).values())
