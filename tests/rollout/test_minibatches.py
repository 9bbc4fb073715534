import itertools
import re

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lit_rlhf.data.batches import NoBatch
from lit_rlhf.errors import UserError
from lit_rlhf.rollout.minibatches import Minibatches, require_room
from tests.ppo_runs import make
from tests.tiny import save_tiny


def cut(
    num_tokens, passes=1, minibatches=1, accumulation=1, max_tokens=None, agree=lambda counts: counts, longest=None
):
    """The plan of episodes of these lengths."""
    settings = Minibatches(
        len(num_tokens), passes, minibatches, accumulation, max_tokens, max(num_tokens) if longest is None else longest
    )
    prompts = np.ones(len(num_tokens), dtype=np.int64)
    return settings, settings.plan(prompts, np.array(num_tokens) - 1, np.random.default_rng(0), agree)


def tokens_of(plan, num_tokens):
    """Those of each micro-batch."""
    return [[sum(num_tokens[row] for row in part[:, 0]) for part in step] for step in plan]


@pytest.mark.parametrize(("episodes", "minibatches", "accumulation"), [(12, 3, 2), (13, 2, 3), (7, 7, 1), (5, 1, 1)])
def test_each_pass_meets_each_episode_once_in_parts_of_nearly_equal_size(episodes, minibatches, accumulation):
    settings, plan = cut([1] * episodes, 3, minibatches, accumulation)
    assert len(plan) == 3 * minibatches and {len(step) for step in plan} == {accumulation}
    assert len(settings) == 3 * minibatches * accumulation
    parts = list(itertools.chain(*plan))
    a_pass = minibatches * accumulation
    passes = [np.concatenate(parts[i : i + a_pass]) for i in range(0, len(parts), a_pass)]
    assert all(sorted(rows.ravel()) == list(range(episodes)) for rows in passes)
    assert len({tuple(rows.ravel()) for rows in passes}) == 3  # a fresh permutation each
    sizes = {len(part) for part in parts}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("max_tokens", [40, 64, 100, 1000])
@pytest.mark.parametrize(("minibatches", "accumulation"), [(1, 1), (4, 1), (2, 3)])
@pytest.mark.parametrize("seed", range(5))
def test_no_micro_batch_has_more_tokens_than_the_limit_and_none_is_needlessly_small(
    max_tokens, minibatches, accumulation, seed
):
    rng = np.random.default_rng(seed)
    num_tokens = rng.integers(1, 41, size=int(rng.integers(minibatches * accumulation, 60))).tolist()
    settings, plan = cut(num_tokens, 2, minibatches, accumulation, max_tokens, longest=40)
    assert len(plan) == 2 * minibatches and {len(step) for step in plan} == {settings.micro_batches}
    for of_pass in (plan[:minibatches], plan[minibatches:]):
        dealt = np.concatenate([np.concatenate(step) for step in of_pass])
        assert sorted(dealt.ravel()) == list(range(len(num_tokens)))
    for step in tokens_of(plan, num_tokens):
        filled = [tokens for tokens in step if tokens]
        assert step[-1] and max(step) <= max_tokens and step == [0] * (len(step) - len(filled)) + filled
        # Two neighbours of a part would not have fitted into one.
        assert len(filled) <= accumulation + 2 * sum(filled) // max_tokens


def test_a_limit_that_all_fits_into_changes_nothing():
    num_tokens = [3, 9, 4, 7, 5, 6]
    for accumulation in (1, 2):
        with_limit = cut(num_tokens, 2, 2, accumulation, max_tokens=30)[1]
        for ours, theirs in zip(with_limit, cut(num_tokens, 2, 2, accumulation)[1], strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_ranks_take_as_many_micro_batches_each_though_one_has_the_longer_episodes():
    told: list[torch.Tensor] = []
    lengths = ([10] * 8, [2] * 8)
    for num_tokens in lengths:
        cut(num_tokens, 1, 2, 1, 20, lambda counts: told.append(counts) or counts, longest=10)
    most = torch.stack(told).max(0).values
    plans = [cut(num_tokens, 1, 2, 1, 20, lambda counts: most, longest=10)[1] for num_tokens in lengths]
    of_rank = [[[len(part) for part in step] for step in plan] for plan in plans]
    assert of_rank == [[[2, 2], [2, 2]], [[2, 2], [2, 2]]]  # the second could have taken one of 4


def test_micro_batches_are_as_many_in_each_iteration_whatever_is_played():
    counts = {len(cut([n] * 64, 4, 4, 1, 256, longest=64)[1][0]) for n in (1, 17, 33, 64)}
    assert counts == {4}  # 16 episodes of 64 tokens, 4 at a time


def test_fewer_episodes_than_micro_batches_are_refused_with_the_numbers():
    message = r"5 episodes per rank .* num_minibatches \(3\) x accumulate_grad_batches \(2\)"
    with pytest.raises(UserError, match=message):
        Minibatches(5, 1, 3, 2, None, 10)


def test_a_limit_below_the_longest_episode_is_refused_with_the_one_that_would_do():
    with pytest.raises(
        UserError, match=re.escape("are 300 tokens, more than data.max_tokens (256)") + ".*raise .* to 300"
    ):
        Minibatches(8, 1, 2, 1, 256, 300)


def grouped(responses, group_size, prompt=10, max_tokens=None, **more):
    """The plan of groups of these response lengths, whose prompts are all as long."""
    most = max(responses)
    options = {"ppo_epochs": 2, "num_minibatches": 2, "accumulate_grad_batches": 1} | more
    cut = Minibatches(
        len(responses),
        **options,
        max_tokens=max_tokens,
        longest=prompt + most,
        group_size=group_size,
        longest_response=most,
    )
    prompts = np.full(len(responses), prompt)
    return cut, cut.plan(prompts, np.array(responses), np.random.default_rng(0), lambda counts: counts)


@pytest.mark.parametrize(("max_tokens", "sharing"), [(None, 4), (50, 4), (49, 2), (29, 1)])
def test_a_group_stays_in_a_step_and_shares_its_prompt_with_as_many_as_fit(max_tokens, sharing):
    cut, plan = grouped([10] * 24, 4, max_tokens=max_tokens)  # six groups of 10 + 4 x 10 tokens
    assert cut.sharing == sharing and {part.shape[1] for step in plan for part in step} == {sharing}
    for step in plan:
        rows = np.concatenate(step)
        assert len({*rows.ravel()}) == 12  # half of the episodes, and only whole groups
        assert all({*range(4 * group, 4 * group + 4)} <= {*rows.ravel()} for group in {*(rows.ravel() // 4)})
        assert all(len({*(row // 4)}) == 1 for row in rows)
    assert len({tuple(np.concatenate(step).ravel()) for step in plan}) == 4  # fresh permutations


@pytest.mark.parametrize("max_tokens", [30, 45, 64, 128, 500])
@pytest.mark.parametrize("seed", range(4))
def test_no_micro_batch_of_groups_has_more_tokens_than_the_limit_nor_a_step_more_of_them_than_told(max_tokens, seed):
    rng = np.random.default_rng(seed)
    responses = [20, *rng.integers(1, 21, size=6 * 9 - 1).tolist()]
    cut, plan = grouped(responses, 6, max_tokens=max_tokens)
    assert {len(step) for step in plan} == {cut.micro_batches}
    for part in (part for step in plan for part in step):
        tokens = 10 * len(part) + sum(responses[i] for i in part.ravel())  # a prompt once for those that share it
        assert tokens <= min(max_tokens, cut.most_tokens)


def test_fewer_groups_than_micro_batches_are_refused_with_the_numbers():
    message = r"8 episodes per rank in 2 groups cannot be cut into num_minibatches \(3\) .*; raise rollout_size"
    with pytest.raises(UserError, match=message):
        Minibatches(8, 1, 3, 1, None, 10, 4, 8)


def test_rollouts_that_no_memory_holds_are_refused():
    with pytest.raises(UserError, match="rollout_size"):
        require_room(10**12, 1, 64, 4)


class Sizes(Callback):
    """Keeps the tokens of each micro-batch, those of passes without gradients among them, and the steps taken."""

    def __init__(self):
        self.learnt, self.scored, self.accumulated = [], [], []

    def on_fit_start(self, trainer, pl_module):
        forward = pl_module.forward_packed

        def counted(packed):
            self.scored.append(packed.input_ids.numel())
            return forward(packed)

        pl_module.forward_packed = counted

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.learnt.append(0 if isinstance(batch, NoBatch) else batch.packed.input_ids.numel())
        self.accumulated.append(trainer.accumulate_grad_batches)


def test_a_run_learns_and_scores_by_micro_batches_within_the_limit_and_takes_the_steps_that_it_has(tmp_path):
    save_tiny(tmp_path / "model")
    sizes = Sizes()
    module, data, trainer = make(
        tmp_path / "model",
        tmp_path,
        trainer={"callbacks": [sizes], "max_epochs": 2},
        data={"max_tokens": 30},  # two episodes of 3 + 8 tokens, or more of shorter ones
        ppo_epochs=2,
        num_minibatches=2,
    )
    trainer.fit(module, data)
    assert trainer.global_step == 2 * 2 * 2
    assert max(sizes.learnt) <= 30 and max(sizes.scored) <= 30
    assert len(sizes.learnt) == 2 * 2 * 2 * 4 and set(sizes.accumulated) == {4}  # 8 episodes of a step, 2 at a time
    assert 0 in sizes.learnt  # some episodes ended early, so that not all are needed
    assert sum(sizes.learnt) == 2 * sum(sizes.scored)
    assert trainer.accumulate_grad_batches == 1  # as it was given


def test_a_strategy_that_cannot_sum_micro_batches_is_refused_with_the_limit_that_needs_none(tmp_path, monkeypatch):
    save_tiny(tmp_path / "model")
    module, data, trainer = make(tmp_path / "model", tmp_path, data={"max_tokens": 24}, num_minibatches=2)
    monkeypatch.setattr(type(trainer.strategy), "handles_gradient_accumulation", True)
    with pytest.raises(UserError, match=r"max_tokens \(24\) .* 8 episodes .* 4 .* SingleDeviceStrategy .* to 88, or"):
        trainer.fit(module, data)
