from dataclasses import replace

import numpy as np
import pytest
import torch

from lit_rlhf import UserError
from lit_rlhf.algorithms.preference import PreferenceModule, agreement, desensitized, sequence_logprobs
from lit_rlhf.callbacks import SampleTable
from lit_rlhf.engine.packing import Example, pack
from lit_rlhf.models.loading import load_policy_with_tokenizer
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


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_what_a_response_is_longer_than_the_other_counts_alpha(alpha):
    # Pairs of 2 against 4 tokens and 3 against 1; of the second chosen response the first token is a tool's.
    longer = Example(np.array([3]), (np.array([4, 5]), np.array([6, 7, 8, 2])))
    tools = np.array([False, True, True, True])
    shorter = Example(np.array([3]), (np.array([9, 4, 5, 2]), np.array([2])), (tools, np.array([True])))
    logprobs = -torch.arange(1.0, 11.0)  # of the tokens, 2 and 3 chosen, then 4 and 1 rejected
    packed = pack([longer, shorter])
    weighted = packed.sum_by_sequence(desensitized(logprobs, packed, alpha))
    assert weighted.tolist() == [-3.0, -3.0 - alpha * 9, -13.0 - alpha * 17, -10.0]


def test_a_tie_agrees_half_with_the_label():
    # margins 1, 0, -3, 2: right, tied, wrong, right
    scores = agreement(torch.tensor([2.0, 1.0, 0.0, 5.0]), torch.tensor([1.0, 1.0, 3.0, 3.0]))
    assert (scores["accuracy"].item(), scores["margin"].item()) == ((1 + 0.5 + 0 + 1) / 4, 0.0)


def test_agreement_carries_no_gradient():
    chosen = torch.ones(3, requires_grad=True)
    assert not any(value.requires_grad for value in agreement(chosen, torch.zeros(3)).values())


class Hinge(PreferenceModule):
    """A method with what `AlignmentModule` asks for, and nothing else."""

    def __init__(self, policy, **kwargs):
        super().__init__(**kwargs)
        self.policy, self.tokenizer = load_policy_with_tokenizer(policy)

    def training_step(self, batch, batch_idx):
        return self.pair_losses(batch, "train").sum() / batch.denominator

    def evaluate(self, batch, stage):
        self.pair_losses(batch, stage)

    def pair_losses(self, batch, stage):
        chosen, rejected = sequence_logprobs(self.policy, batch.packed)
        losses = torch.relu(1 - (chosen - rejected))
        self.log_pairs(stage, batch, losses, agreement(chosen, rejected))
        return losses


class Unfinished(Hinge):
    """One whose author forgot them."""

    def __init__(self):
        PreferenceModule.__init__(self)


def test_a_method_of_ones_own_trains_validates_and_shows_samples_with_what_the_base_asks_for(inputs, tmp_path):
    _, data = make_stage("dpo", inputs)
    module = Hinge(str(inputs / "model"))
    data.tokenizer = module.tokenizer
    trainer = make_trainer(tmp_path, max_epochs=1, limit_val_batches=1.0, callbacks=[SampleTable(2)])
    trainer.fit(module, data)
    assert {"train/accuracy", "val/accuracy"} < set(trainer.callback_metrics)
    assert len(module.samples(data.sample_prompts(2))) == 2


def test_a_method_that_sets_no_network_is_told_so_before_it_trains(inputs, tmp_path):
    _, data = make_stage("dpo", inputs)
    with pytest.raises(UserError, match=r"Unfinished must set self\.tokenizer and self\.policy in its constructor"):
        make_trainer(tmp_path, max_epochs=1).fit(Unfinished(), data)
