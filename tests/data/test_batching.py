import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.utils.data import Dataset

from lit_rlhf.data.batching import ResumableLoader, TokenBudgetSampler
from lit_rlhf.data.microbatches import MicroBatch
from lit_rlhf.errors import UserError

LENGTHS = np.random.default_rng(0).integers(1, 40, size=101)


def all_ranks(ranks, epoch=0, **options):
    """What each rank gets in an epoch."""
    dealt = []
    for rank in range(ranks):
        sampler = TokenBudgetSampler(num_replicas=ranks, rank=rank, **options)
        sampler.set_epoch(epoch)
        dealt.append(list(sampler))
        assert len(dealt[-1]) == len(sampler)
    return dealt


@pytest.mark.parametrize("limit", [None, 5])
def test_the_first_micro_batch_of_a_step_knows_the_steps_micro_batches_of_its_rank(limit):
    options = {"lengths": LENGTHS, "max_tokens": 100, "accumulate_grad_batches": 3, "limit_batches": limit}
    for dealt in all_ranks(2, **options):
        taken = dealt[:limit]
        for number, batch in enumerate(taken):
            step = [] if number % 3 else [other.indices.tolist() for other in taken[number : number + 3]]
            assert [rows.tolist() for rows in batch.step] == step
    assert all(batch.step is None for batch in all_ranks(1, lengths=LENGTHS, accumulate_grad_batches=None)[0])


def test_after_a_resume_in_the_middle_of_a_step_no_micro_batch_passes_for_its_first():
    sampler = TokenBudgetSampler(LENGTHS, max_tokens=100, accumulate_grad_batches=3)
    sampler.start = 2
    assert [len(batch.step) for batch in sampler][:4] == [0, 3, 0, 0]


def indices(batches):
    return [batch.indices.tolist() for batch in batches]


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60),
    spare=st.integers(20, 40),
    batch_size=st.none() | st.integers(1, 5),
    ranks=st.integers(1, 4),
    shuffle=st.booleans(),
    accumulate=st.sampled_from([None, 1]),
    epoch=st.integers(0, 3),
)
def test_every_example_is_dealt_once_within_the_budget_and_equally_to_all_ranks(
    lengths, spare, batch_size, ranks, shuffle, accumulate, epoch
):
    options = {"lengths": np.array(lengths), "max_tokens": 2 * spare, "batch_size": batch_size, "shuffle": shuffle}
    options["accumulate_grad_batches"] = accumulate
    if len(lengths) < ranks:
        with pytest.raises(UserError, match=f"{len(lengths)} examples are too few for {ranks} ranks"):
            all_ranks(ranks, **options)
        return
    dealt = all_ranks(ranks, epoch, **options)
    assert len({len(batches) for batches in dealt}) == 1
    assert len(dealt[0]) == len(all_ranks(ranks, epoch + 1, **options)[0])
    batches = [batch for batches in dealt for batch in batches]
    assert sorted(itertools.chain(*indices(batches))) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in batch.indices) <= 2 * spare for batch in batches)
    if batch_size is not None:
        assert sum(max(len(batch.indices) - batch_size, 0) for batch in batches) < ranks


def test_the_order_depends_on_seed_and_epoch_alone():
    def dealt(seed, epoch):
        return indices(all_ranks(2, epoch, lengths=LENGTHS, max_tokens=100, seed=seed)[1])

    assert dealt(0, 0) == dealt(0, 0)
    assert dealt(0, 0) != dealt(0, 1) != dealt(1, 1)


def test_the_micro_batch_of_what_is_left_over_has_no_fixed_place():
    places = set()
    for epoch in range(6):
        [batches] = all_ranks(1, epoch, lengths=LENGTHS, max_tokens=300)
        places.add(int(np.argmin([LENGTHS[batch.indices].sum() for batch in batches])))
    assert len(places) > 2


def test_an_epoch_has_room_where_longest_first_needs_more_micro_batches_than_another_order():
    # Best fit packs these into 5 micro-batches in the order of epoch 0, and longest first into 6.
    lengths = np.array([3, 11, 16, 3, 9, 5, 8, 16, 3, 5])
    for epoch in range(4):
        [batches] = all_ranks(1, epoch, lengths=lengths, max_tokens=16)
        assert len(batches) == 6


def test_a_batch_size_alone_gives_the_usual_number_of_batches():
    for n, expected in ((64, 8), (65, 9)):
        for shuffle in (True, False):
            [batches] = all_ranks(1, lengths=np.ones(n, dtype=int), batch_size=8, shuffle=shuffle)
            assert len(batches) == expected
    assert list(itertools.chain(*indices(batches))) == list(range(65)), "unshuffled, in the order of the data"


def test_heavy_tailed_lengths_leave_little_of_the_budget_unused():
    lengths = np.minimum(np.random.default_rng(1).lognormal(4, 1, size=3000).astype(int) + 1, 1000)
    for epoch in range(3):
        [batches] = all_ranks(1, epoch, lengths=lengths, max_tokens=2000)
        assert lengths.sum() / (2000 * len(batches)) > 0.97


def test_an_example_over_the_budget_is_named_with_what_to_do():
    with pytest.raises(UserError, match=r"example 1: 9 tokens are more than data.max_tokens \(8\).* raise it to 9"):
        TokenBudgetSampler(np.array([3, 9]), max_tokens=8)
    with pytest.raises(UserError, match=r"3 examples do not divide among 2 ranks .* raise it to 12"):
        list(TokenBudgetSampler(np.array([6, 6, 7]), max_tokens=8, num_replicas=2))


class Squares(Dataset):
    """Example i holds `items[i]` numbers; its loss is the sum of (w - x)^2 over them."""

    def __init__(self, items):
        rng = np.random.default_rng(5)
        self.values = [torch.tensor(rng.normal(size=count)) for count in items]

    def __getitem__(self, batch: MicroBatch):
        return torch.cat([self.values[i] for i in batch.indices]), torch.tensor(batch.denominator), batch.indices


class Learner(LightningModule):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.gradients, self.seen = [], []

    def training_step(self, batch, batch_idx):
        values, denominator, which = batch
        self.seen.append((self.current_epoch, which.tolist()))
        return (self.w - values).square().sum() / denominator

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(self.w.grad.item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(tmp_path, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=tmp_path, **{"enable_checkpointing": False, **quiet, **options})


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("limit", [None, 7])
def test_each_gradient_is_the_mean_over_the_items_of_its_step(tmp_path, limit, shuffle):
    items = LENGTHS[:25]
    options = {"max_tokens": 60, "accumulate_grad_batches": 4, "limit_batches": limit, "shuffle": shuffle}
    sampler = TokenBudgetSampler(LENGTHS[:25], items, **options)
    data, learner = Squares(items), Learner()
    assert len(sampler) % 4 and len(sampler) > 7, "the last step of the epoch must be a shorter one"
    trainer(tmp_path, max_epochs=1, accumulate_grad_batches=4, limit_train_batches=limit).fit(
        learner, ResumableLoader(data, sampler)
    )
    batches = indices(sampler)[:limit]
    steps = [batches[i : i + 4] for i in range(0, len(batches), 4)]
    # d/dw of the mean of (w - x)^2 at w = 0 is -2 mean(x), over all numbers of the step alike
    expected = [-2 * torch.cat([data.values[i] for i in itertools.chain(*step)]).mean().item() for step in steps]
    assert learner.gradients == pytest.approx(expected)


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), (2, 1), (3, 4)])
def test_shares_of_ranks_and_steps_add_up_to_the_mean(ranks, accumulate):
    losses = np.random.default_rng(2).normal(size=len(LENGTHS))
    dealt = all_ranks(ranks, lengths=LENGTHS, items=LENGTHS, max_tokens=90, accumulate_grad_batches=accumulate)
    for begin in range(0, len(dealt[0]), accumulate):
        step = [batch for batches in dealt for batch in batches[begin : begin + accumulate]]
        members = np.concatenate([batch.indices for batch in step])
        # Lightning divides each loss by `accumulate`, the strategy averages over ranks
        share = sum(losses[batch.indices].sum() / batch.denominator for batch in step) / accumulate / ranks
        assert share == pytest.approx(losses[members].sum() / LENGTHS[members].sum())


def test_without_shuffling_rows_are_learnt_about_in_their_order():
    lengths = np.full(40, 10)
    for epoch in range(2):
        (dealt,) = all_ranks(1, epoch, lengths=lengths, max_tokens=50, shuffle=False)
        assert indices(dealt) == np.arange(40).reshape(8, 5).tolist()
    (dealt,) = all_ranks(1, lengths=LENGTHS, max_tokens=90, shuffle=False)
    firsts = [min(batch) for batch in indices(dealt)]
    assert firsts == sorted(firsts)
    displaced = np.abs(np.argsort(list(itertools.chain(*indices(dealt)))) - np.arange(len(LENGTHS)))
    assert displaced.mean() < 8, "best fit fills holes with later rows; any order would be 34 off"


def test_the_mean_of_validation_losses_is_the_mean_over_all_items():
    losses = np.random.default_rng(2).normal(size=len(LENGTHS))
    options = {"max_tokens": 90, "shuffle": False, "accumulate_grad_batches": None}
    dealt = all_ranks(2, lengths=LENGTHS, items=LENGTHS, **options)
    shares = [losses[batch.indices].sum() / batch.denominator for batches in dealt for batch in batches]
    assert np.mean(shares) == pytest.approx(losses.sum() / LENGTHS.sum())


class Saver(Callback):
    """A checkpoint after each step and at the end of each epoch, the moments at which ModelCheckpoint writes."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *args):
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer, module):
        trainer.save_checkpoint(self.folder / f"epoch={trainer.current_epoch}.ckpt")


def make_loader(workers):
    sampler = TokenBudgetSampler(LENGTHS, max_tokens=300, seed=3)
    return ResumableLoader(Squares(LENGTHS), sampler, num_workers=workers, persistent_workers=workers > 0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limits", [{"max_epochs": 3}, {"max_steps": 20}], ids=["epochs", "steps"])
def test_a_resumed_run_sees_the_batches_that_were_left(tmp_path, workers, limits):
    whole = Learner()
    trainer(tmp_path, callbacks=Saver(tmp_path), **limits).fit(whole, make_loader(0))
    length = len(make_loader(0))
    assert length == 7 and len({str(which) for _, which in whole.seen}) == len(whole.seen)
    # in the first epoch, at its end, at the second's beginning and middle
    for step in (3, length) if workers else (3, length, length + 1, length + 5):
        resumed = Learner()
        trainer(tmp_path, **limits).fit(resumed, make_loader(workers), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert resumed.seen == whole.seen[step:]


def test_a_checkpoint_of_an_epochs_end_goes_on_with_the_next_epoch(tmp_path):
    whole = Learner()
    trainer(tmp_path, max_epochs=3, callbacks=Saver(tmp_path)).fit(whole, make_loader(0))
    for workers in (0, 2):
        resumed = Learner()
        trainer(tmp_path, max_epochs=3).fit(resumed, make_loader(workers), ckpt_path=tmp_path / "epoch=0.ckpt")
        assert resumed.seen == whole.seen[len(make_loader(0)) :]


def test_state_counts_batches_handed_out_not_those_fetched_ahead():
    loader = make_loader(2)
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    assert loader.state_dict()["taken"] == 3
    again = make_loader(0)
    again.load_state_dict(loader.state_dict())
    assert again.state_dict() == loader.state_dict()
    assert [batch[2].tolist() for batch in again] == indices(make_loader(0).sampler)[3:]
    assert len(list(again)) == len(again), "the epoch after it is whole"


def test_other_data_in_mid_epoch_is_refused_and_at_an_epochs_end_is_said():
    state = {**make_loader(0).state_dict(), "taken": 2}
    other = ResumableLoader(Squares(LENGTHS), TokenBudgetSampler(LENGTHS, max_tokens=200, seed=3))
    with pytest.raises(UserError, match="stopped after 2 micro-batches of epoch 0, but data, max_tokens"):
        other.load_state_dict(state)
    with pytest.warns(UserWarning, match="comes from a run with other data, max_tokens"):
        other.load_state_dict({**state, "taken": state["length"]})
    assert SimpleNamespace(**other.state_dict()).epoch == 0


def test_other_accumulation_in_mid_epoch_is_refused_and_at_an_epochs_end_is_taken():
    state = {**make_loader(0).state_dict(), "taken": 2}
    other = ResumableLoader(Squares(LENGTHS), TokenBudgetSampler(LENGTHS, max_tokens=90, accumulate_grad_batches=4))
    state["plan"] = other.sampler.fingerprint()
    with pytest.raises(UserError, match=r"accumulate_grad_batches \(4\) was 1 when it was taken in the mid"):
        other.load_state_dict(state)
    other.load_state_dict({**state, "taken": state["length"]})
    other.load_state_dict({name: value for name, value in state.items() if name != "accumulate"})  # does not say
    assert other.state_dict()["taken"] == 2 and other.state_dict()["accumulate"] == 4


def test_other_orders_of_many_examples_seldom_need_more_micro_batches_than_an_epoch_has(monkeypatch):
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(1200), 0.7, 20_000).astype(int), 20, 4096)
    sampler, filled = TokenBudgetSampler(lengths, max_tokens=4096), []
    real = sampler._fill
    monkeypatch.setattr(sampler, "_fill", lambda order: filled.append(1) or real(order))
    plans = [sampler.plan(epoch) for epoch in range(6)]
    assert len(filled) == 6
    for plan in plans:
        assert len(plan) == len(sampler) and sorted(np.concatenate([one.indices for one in plan])) == list(
            range(20_000)
        )
        assert max(int(lengths[batch.indices].sum()) for batch in plan) <= 4096
    assert lengths.sum() / 4096 / len(sampler) > 0.97
