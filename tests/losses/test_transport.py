import itertools
import math

import pytest
import torch

from lit_rlhf.losses import aot_loss, aot_unpaired_loss, dpo_loss
from tests.losses.family import FAMILY, STARTS, descend, randoms


class TestLimits:
    """Losses without an optimum, on free log-ratios: where gradient descent takes them."""

    @pytest.mark.parametrize("loss", [aot_loss, aot_unpaired_loss])
    def test_aot_ends_where_one_distribution_dominates_the_other_quantile_by_quantile(self, loss):
        (chosen, rejected), end = descend(loss, STARTS, steps=1000)
        if loss is aot_loss:  # the policy's margins over the reference's, which are 0 here
            assert (chosen - rejected).min() > 10
        else:
            assert (chosen.sort().values - rejected.sort().values).min() > 10
        assert end.max() < 0.01  # its infimum is 0

    @pytest.mark.parametrize("loss", [aot_loss, aot_unpaired_loss])
    def test_aot_is_dpo_on_one_pair_and_no_more_than_dpo_on_many(self, loss):
        pairs = tuple(randoms(seed, 32) for seed in range(4))
        for i in range(32):
            pair = tuple(x[i : i + 1] for x in pairs)
            assert torch.allclose(loss(*pair, 0.3), dpo_loss(*pair, 0.3))
        assert loss(*pairs, 0.3).mean() < dpo_loss(*pairs, 0.3).mean() - 0.01


class TestEquivalences:
    """The same number from another road."""

    pair = tuple(randoms(seed) for seed in range(4))

    @pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
    def test_aot_is_the_cheapest_coupling_of_its_two_samples(self, name):
        chosen, rejected, ref_chosen, ref_rejected = self.pair
        u, v = {
            "aot": (chosen - rejected, ref_chosen - ref_rejected),
            "aot_unpaired": (chosen - ref_chosen, rejected - ref_rejected),
        }[name]
        # Kantorovich by brute force: over all 720 ways to pair the two samples, with a convex cost.
        cheapest = min(
            sum(math.log1p(math.exp(-0.3 * (a - b))) for a, b in zip(u.tolist(), order, strict=True))
            for order in itertools.permutations(v.tolist())
        )
        assert FAMILY[name][0](*self.pair, 0.3).sum().item() == pytest.approx(cheapest)

    def test_unpaired_aot_does_not_care_who_was_paired_with_whom(self):
        chosen, rejected, ref_chosen, ref_rejected = self.pair
        other = torch.tensor([3, 0, 5, 1, 4, 2])
        shuffled = aot_unpaired_loss(chosen, rejected[other], ref_chosen, ref_rejected[other], 0.3)
        assert torch.equal(shuffled, aot_unpaired_loss(*self.pair, 0.3))
