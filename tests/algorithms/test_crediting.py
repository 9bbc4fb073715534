"""From a played rollout to what is learnt from, whichever the method."""

import pytest
import torch

from lit_rlhf import GRPO, PPO, RLOO, FixedKL, KLPenalty, UserError
from lit_rlhf.losses import Advantages, rloo
from lit_rlhf.losses.kl import k2
from tests.ppo_runs import Logged, away_from_reference, constant, make, record


def test_groups_are_those_that_were_played_together_on_each_estimator(folder, tmp_path):
    seen = []

    def watched(rollout):
        seen.append(rollout)
        return rloo(rollout)

    data = {"group_size": 4, "rollout_size": 80}  # of 16 prompts: four come twice
    module, data, trainer = make(folder, tmp_path, kind=RLOO, advantages=watched, data=data)
    trainer.fit(module, data)
    rollout = seen[-1]
    assert rollout.group_index.bincount().tolist() == [4] * 20
    assert sorted(rollout.prompt_index.bincount().tolist()) == [4] * 12 + [8] * 4
    for group in range(20):
        assert len(set(rollout.prompt_index[rollout.group_index == group].tolist())) == 1


def test_groups_of_one_are_refused_by_the_estimator_that_was_chosen_whatever_the_method(folder, tmp_path):
    module, data, trainer = make(folder, tmp_path, kind=PPO, advantages=rloo)
    with pytest.raises(UserError, match=r"^data\.group_size \(1\): rloo compares completions of one prompt"):
        trainer.fit(module, data)
    module, data, trainer = make(folder, tmp_path, kind=PPO, advantages=rloo, data={"group_size": 2})
    trainer.fit(module, data)


def test_an_estimator_that_needs_more_of_a_group_says_so_before_anything_is_played(folder, tmp_path):
    def of_three(rollout):
        if rollout.group_index.bincount().min() < 3:
            raise ValueError("three are needed")
        return Advantages(rollout.token_rewards, rollout.token_rewards)

    module, data, trainer = make(folder, tmp_path, kind=RLOO, advantages=of_three, data={"group_size": 2})
    with pytest.raises(UserError, match=r"^data\.group_size \(2\): of_three raised ValueError: three are needed"):
        trainer.fit(module, data)


def test_advantages_are_whitened_where_that_is_asked_for(folder, tmp_path):
    for whiten in (False, True):
        data = {"group_size": 4}
        module = record(folder, tmp_path, kind=RLOO, whiten_advantages=whiten, data=data)
        ((batch, _),) = module.seen
        variance = batch.advantages.var(correction=0).item()
        assert (variance == pytest.approx(1, abs=1e-4)) == whiten


@pytest.mark.parametrize("average", ["tokens", "responses", "max_new_tokens"])
def test_a_word_for_the_average_that_is_none_is_refused_and_each_of_them_weighs_as_it_says(average, folder, tmp_path):
    module = record(folder, tmp_path, kind=GRPO, loss_average=average, data={"group_size": 4})
    ((batch, _),) = module.seen
    lengths = batch.packed.response_lengths[batch.packed.sequence_ids]
    expected = {
        "tokens": torch.full_like(lengths, 1 / len(lengths)),
        "responses": 1 / lengths / 16,
        "max_new_tokens": torch.full_like(lengths, 1 / (16 * 8)),
    }[average]
    weights = 1.0 if batch.weights is None else batch.weights
    torch.testing.assert_close(weights / batch.denominator * torch.ones_like(lengths), expected)
    with pytest.raises(UserError, match=r"loss_average \('sums'\) must be tokens, responses or max_new_tokens"):
        GRPO(str(folder), loss_average="sums")


def test_k2_of_whole_responses_is_charged_in_the_loss(folder, tmp_path):
    logged = Logged("grpo/kl_loss")
    module, data, trainer = make(
        folder,
        tmp_path,
        reward=constant,
        kind=GRPO,
        kl=FixedKL(0.5),
        kl_penalty=KLPenalty("loss", "k2_sequence"),
        loss_average="tokens",
        data={"group_size": 4},
        trainer={"callbacks": [logged], "log_every_n_steps": 1},
        learning_rate=0.0,
    )
    away_from_reference(module)
    trainer.fit(module, data)
    columns = trainer.train_dataloader.experience.tokens
    pairs = zip(columns["old_logprobs"], columns["ref_logprobs"], strict=True)
    whole = [k2(old.sum(), ref.sum()).item() for old, ref in pairs]
    tokens = sum(map(len, columns["old_logprobs"]))
    assert logged.values[-1] == pytest.approx(sum(whole) / tokens, rel=1e-4)
    with pytest.raises(UserError, match=r"^kl_penalty: estimator k2_sequence is of whole responses.*set place: loss"):
        KLPenalty("reward", "k2_sequence")


def test_a_checkpoint_of_before_running_means_is_gone_on_with(folder, tmp_path):
    module, data, trainer = make(folder, tmp_path, data={"group_size": 4}, kind=RLOO)
    trainer.fit(module, data)
    state = module.state_of_rollouts()
    assert state["returns_seen"][2] == 16
    del state["returns_seen"]
    module.load_state_of_rollouts(state, "it")
    assert module.returns_seen.size == 0
    with pytest.raises(UserError, match="it: expected a mapping with stopped"):
        module.load_state_of_rollouts({name: state[name] for name in state if name != "stopped"}, "it")
