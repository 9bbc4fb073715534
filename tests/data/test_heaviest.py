import numpy as np
from torch.utils.data import Dataset

from lit_rlhf.data.batching import ResumableLoader, TokenBudgetSampler
from lit_rlhf.data.heaviest import heaviest


class Rows(Dataset):
    """Gives back which rows a micro-batch has."""

    def __getitem__(self, batch):
        return sorted(batch.indices.tolist())


def test_the_batches_of_most_tokens_and_of_most_items_are_found():
    # One row a micro-batch: row 2 has most tokens, row 0 most items.
    sampler = TokenBudgetSampler(np.array([5, 6, 9]), np.array([4, 1, 1]), batch_size=1, shuffle=False)
    assert sorted(heaviest(ResumableLoader(Rows(), sampler))) == [[0], [2]]


def test_one_that_is_both_comes_once():
    sampler = TokenBudgetSampler(np.array([5, 6, 9]), np.array([1, 1, 4]), batch_size=1, shuffle=False)
    assert heaviest(ResumableLoader(Rows(), sampler)) == [[2]]


def test_no_planned_batch_is_heavier():
    lengths = np.random.default_rng(0).integers(1, 20, 60)
    sampler = TokenBudgetSampler(lengths, lengths, max_tokens=64)
    (most,) = heaviest(ResumableLoader(Rows(), sampler), epochs=2)
    planned = [lengths[b.indices].sum() for epoch in (0, 1) for b in sampler.plan(epoch)]
    assert lengths[most].sum() == max(planned) <= 64
