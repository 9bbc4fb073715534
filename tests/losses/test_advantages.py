import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rlhf.losses.advantages import (
    Moments,
    ScoredRollout,
    explained_variance,
    gae,
    make_row_mask,
    masked_moments,
    pad_rows,
    token_rewards,
    unpad_rows,
    whiten,
)
from tests.losses.random_tensors import randoms

# Rows of the masks below: full; ended early; two turns with a gap of another speaker's tokens; one token.
MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 0, 0, 0, 0, 0],
    ],
    dtype=torch.bool,
)


def gae_by_definition(rewards, values, gamma, gae_lambda):
    """A_t = Σ_k (γλ)^k δ_{t+k}, a double loop over one dense episode."""
    T = len(rewards)
    deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < T else 0.0) - values[t] for t in range(T)]
    return [sum((gamma * gae_lambda) ** k * deltas[t + k] for k in range(T - t)) for t in range(T)]


class TestRows:
    def test_row_mask_of_packed_tokens(self):
        # sequence 0 has two tokens, 1 has none, 2 has three
        mask = make_row_mask(torch.tensor([0, 0, 2, 2, 2]), 3)
        assert mask.int().tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]

    def test_pad_rows_fills_rows_in_order_with_zeros_behind(self):
        mask = torch.tensor([[True, True, False], [True, True, True]])
        assert pad_rows(torch.tensor([1.0, 2, 3, 4, 5]), mask).tolist() == [[1, 2, 0], [3, 4, 5]]

    @settings(deadline=None)  # a busy machine is no failure
    @given(lengths=st.lists(st.integers(0, 7), min_size=1, max_size=6))
    def test_unpad_rows_is_the_inverse_of_pad_rows(self, lengths):
        sequence_ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        flat = randoms(sum(lengths))
        mask = make_row_mask(sequence_ids, len(lengths))
        assert mask.sum(dim=1).tolist() == lengths
        assert torch.equal(unpad_rows(pad_rows(flat, mask), mask), flat)

    @pytest.mark.parametrize("cells", [4, 6])
    def test_pad_rows_refuses_a_mask_of_another_size(self, cells):
        with pytest.raises(ValueError, match=rf"row_mask has {cells} cells True for 5 values"):
            pad_rows(torch.ones(5), torch.arange(6).view(2, 3) < cells)


class TestTokenRewards:
    def test_the_score_lands_on_the_last_response_token_and_nowhere_else(self):
        rewards = token_rewards(torch.tensor([1.0, 2, 3, 4]), torch.zeros(4, 6), 0.1, MASK)
        expected = torch.zeros(4, 6)
        expected[0, 5], expected[1, 2], expected[2, 4], expected[3, 0] = 1, 2, 3, 4
        assert torch.equal(rewards, expected)

    def test_hand_worked_numbers(self):
        # row: kl 1, 2 on two tokens and 9 in the padding; coefficient 0.5, score 10: -0.5, -1 + 10, 0
        mask = torch.tensor([[True, True, False]])
        rewards = token_rewards(torch.tensor([10.0]), torch.tensor([[1.0, 2.0, 9.0]]), 0.5, mask)
        assert rewards.tolist() == [[-0.5, 9.0, 0.0]]

    def test_their_sum_is_the_score_minus_the_weighted_kl(self):
        scores, kl = randoms(4), randoms(4, 6, seed=1)
        total = token_rewards(scores, kl, 0.3, MASK).sum(dim=1)
        assert torch.allclose(total, scores - 0.3 * torch.where(MASK, kl, 0).sum(dim=1))

    def test_garbage_in_masked_cells_changes_nothing(self):
        scores, kl = randoms(4), randoms(4, 6, seed=1)
        garbage = torch.where(MASK, kl, torch.nan)
        assert torch.equal(token_rewards(scores, garbage, 0.3, MASK), token_rewards(scores, kl, 0.3, MASK))

    def test_a_response_without_a_token_is_refused_by_its_row(self):
        mask = MASK.clone()
        mask[1] = False
        with pytest.raises(ValueError, match=r"responses \[1\] have no token"):
            token_rewards(torch.zeros(4), torch.zeros(4, 6), 0.1, mask)

    def test_scores_that_would_broadcast_are_refused(self):
        with pytest.raises(ValueError, match=r"scores must be \(B,\), got \(4, 1\) beside kl \(4, 6\)"):
            token_rewards(torch.zeros(4, 1), torch.zeros(4, 6), 0.1, MASK)


class TestGAE:
    @pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.7, 0.0)])
    def test_it_agrees_with_the_definition_on_each_rows_own_tokens(self, gamma, gae_lambda):
        rewards, values = randoms(4, 6), randoms(4, 6, seed=1)
        advantages, returns = gae(ScoredRollout(rewards, values, MASK), gamma, gae_lambda)
        for row in range(4):
            here = MASK[row]
            own_values = values[row, here].tolist()
            expected = gae_by_definition(rewards[row, here].tolist(), own_values, gamma, gae_lambda)
            assert advantages[row, here].tolist() == pytest.approx(expected)
            own_returns = [a + v for a, v in zip(expected, own_values, strict=True)]
            assert returns[row, here].tolist() == pytest.approx(own_returns)

    def test_hand_worked_numbers(self):
        # γ = 1, λ = ½, r = (0, 1), V = (0.5, 0.25) and then 0:
        # δ_2 = 1 + 0 - 0.25 = 0.75; δ_1 = 0 + 0.25 - 0.5 = -0.25; A_1 = -0.25 + ½ 0.75 = 0.125
        rewards, values = torch.tensor([[0.0, 1.0, 7.0]]), torch.tensor([[0.5, 0.25, 7.0]])
        mask = torch.tensor([[True, True, False]])
        advantages, returns = gae(ScoredRollout(rewards, values, mask), 1.0, 0.5)
        assert advantages.tolist() == [[0.125, 0.75, 0.0]]
        assert returns.tolist() == [[0.625, 1.0, 0.0]]

    def test_lambda_1_is_monte_carlo(self):
        rewards, values = randoms(4, 6), randoms(4, 6, seed=1)
        _, returns = gae(ScoredRollout(rewards, values, MASK), 1.0, 1.0)
        for row in range(4):
            own = rewards[row, MASK[row]]
            assert returns[row, MASK[row]].tolist() == pytest.approx([own[t:].sum().item() for t in range(len(own))])

    @pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 1.0])
    def test_gamma_discounts_a_score_by_its_distance(self, gae_lambda):
        # A score of 1 on the last of four tokens, and the critic that knows it: returns γ³, γ², γ, 1 whatever λ.
        rewards, gamma = torch.tensor([[0.0, 0, 0, 1]]), 0.5
        values = torch.tensor([[0.125, 0.25, 0.5, 1.0]])
        mask = torch.ones(1, 4, dtype=torch.bool)
        advantages, returns = gae(ScoredRollout(rewards, values, mask), gamma, gae_lambda)
        assert returns.tolist() == [[0.125, 0.25, 0.5, 1.0]]
        assert not advantages.any()
        _, monte_carlo = gae(ScoredRollout(rewards, torch.zeros(1, 4), mask), gamma, 1.0)
        assert monte_carlo.tolist() == [[0.125, 0.25, 0.5, 1.0]]

    def test_gamma_0_sees_the_next_reward_alone(self):
        rewards, values = randoms(4, 6), randoms(4, 6, seed=1)
        _, returns = gae(ScoredRollout(rewards, values, MASK), 0.0, 0.95)
        assert torch.allclose(returns, rewards * MASK)

    def test_lambda_decides_how_far_the_score_reaches_in_one_iteration(self):
        # A critic that knows nothing: the score of the last token reaches token t by (γλ)^(distance) alone.
        rewards, zeros = torch.tensor([[0.0, 0, 0, 1]]), torch.zeros(1, 4)
        mask = torch.ones(1, 4, dtype=torch.bool)
        for gae_lambda, expected in ((0.0, [0, 0, 0, 1]), (0.5, [0.125, 0.25, 0.5, 1]), (1.0, [1, 1, 1, 1])):
            assert gae(ScoredRollout(rewards, zeros, mask), 1.0, gae_lambda)[0].tolist() == [expected]

    def test_lambda_0_is_one_step_td(self):
        rewards, values = randoms(1, 4), randoms(1, 4, seed=1)
        advantages, _ = gae(ScoredRollout(rewards, values, torch.ones(1, 4, dtype=torch.bool)), 0.9, 0.0)
        next_values = torch.cat([values[:, 1:], torch.zeros(1, 1)], dim=1)
        assert torch.allclose(advantages, rewards + 0.9 * next_values - values)

    def test_a_perfect_critic_leaves_no_advantage_whatever_lambda(self):
        rewards = randoms(4, 6) * MASK
        values = rewards.flip(1).cumsum(1).flip(1)  # the rewards to come, which a sure future allows to know
        for gae_lambda in (0.0, 0.5, 1.0):
            advantages, returns = gae(ScoredRollout(rewards, values, MASK), 1.0, gae_lambda)
            assert torch.allclose(advantages, torch.zeros(4, 6, dtype=torch.float64), atol=1e-12)
            assert torch.allclose(returns, values * MASK)

    def test_a_gap_between_two_turns_is_no_step(self):
        # tokens at 0, 1 and 4: the same episode without its gap must give the same advantages
        rewards, values = randoms(1, 6), randoms(1, 6, seed=1)
        with_gap, _ = gae(ScoredRollout(rewards, values, MASK[2:3]), 0.9, 0.7)
        own = [0, 1, 4]
        dense, _ = gae(ScoredRollout(rewards[:, own], values[:, own], torch.ones(1, 3, dtype=torch.bool)), 0.9, 0.7)
        assert torch.allclose(with_gap[:, own], dense)
        assert with_gap[0, [2, 3, 5]].tolist() == [0, 0, 0]

    @settings(max_examples=25, deadline=None)
    @given(pattern=st.lists(st.booleans(), min_size=1, max_size=8), seed=st.integers(0, 99))
    def test_masked_cells_change_nothing(self, pattern, seed):
        mask = torch.tensor([pattern])
        rewards, values = randoms(*mask.shape, seed=seed), randoms(*mask.shape, seed=seed + 100)
        clean = gae(ScoredRollout(rewards, values, mask), 0.9, 0.7)
        garbage = gae(
            ScoredRollout(rewards.masked_fill(~mask, torch.nan), values.masked_fill(~mask, torch.inf), mask), 0.9, 0.7
        )
        assert torch.equal(clean[0], garbage[0]) and torch.equal(clean[1], garbage[1])

    def test_padding_on_the_right_changes_nothing(self):
        rewards, values = randoms(4, 6), randoms(4, 6, seed=1)
        mask = torch.cat([MASK, torch.zeros(4, 3, dtype=torch.bool)], dim=1)
        padded, _ = gae(
            ScoredRollout(torch.cat([rewards, randoms(4, 3)], 1), torch.cat([values, randoms(4, 3)], 1), mask),
            1.0,
            0.95,
        )
        assert torch.equal(padded[:, :6], gae(ScoredRollout(rewards, values, MASK), 1.0, 0.95)[0])


class TestWhiten:
    def test_mean_0_and_population_variance_1_over_the_mask(self):
        whitened = whiten(3 + 2 * randoms(4, 6), MASK)
        assert whitened[MASK].mean().item() == pytest.approx(0, abs=1e-7)
        assert whitened[MASK].var(correction=0).item() == pytest.approx(1)

    def test_it_is_zero_outside_of_the_mask(self):
        assert not whiten(randoms(4, 6) + 5, MASK)[~MASK].any()

    def test_plus_and_minus_one_among_mixed_lengths_stay_so(self):
        # Row of four +1 and row of four -1 in a grid with padding: mean 0 and variance 1 already.
        x = torch.tensor([[1.0, 1, 1, 1, 0, 0], [-1, -1, -1, -1, 0, 0]])
        assert torch.allclose(whiten(x, x != 0), x)

    def test_garbage_in_masked_cells_changes_nothing(self):
        x = randoms(4, 6)
        assert torch.equal(whiten(x.masked_fill(~MASK, torch.nan), MASK), whiten(x, MASK))

    def test_rows_and_packed_tokens_whiten_alike(self):
        x = randoms(4, 6)
        assert torch.equal(whiten(x, MASK)[MASK], whiten(x[MASK]))

    def test_moments_of_ranks_add_up_to_those_of_the_whole(self):
        x = randoms(30)
        ranks = [x[:7], x[7:8], x[8:]]  # rollouts of unequal length
        moments = Moments(*torch.stack([torch.stack(masked_moments(part)) for part in ranks]).sum(dim=0))
        assert torch.allclose(torch.cat([whiten(part, moments=moments) for part in ranks]), whiten(x))
        assert not torch.allclose(torch.cat([whiten(part) for part in ranks]), whiten(x), atol=0.01)

    def test_keep_mean_scales_around_the_mean(self):
        x = 3 + 2 * randoms(50)
        scaled = whiten(x, keep_mean=True)
        assert scaled.mean().item() == pytest.approx(x.mean().item())
        assert scaled.var(correction=0).item() == pytest.approx(1)

    def test_a_constant_becomes_zero(self):
        assert torch.equal(whiten(torch.full((5,), 0.3)), torch.zeros(5))

    def test_a_large_mean_does_not_eat_the_variance(self):
        x = 1e5 + torch.tensor([0.0, 0.5, 1.0, 1.5])  # in float32, E[x²] - E[x]² would lose it
        # variance 0.3125: -0.75 / √0.3125 = -1.341641
        assert whiten(x).tolist() == pytest.approx([-1.341641, -0.447214, 0.447214, 1.341641], abs=0.02)

    def test_no_cell_at_all_gives_zeros_not_nan(self):
        mask = torch.zeros(3, dtype=torch.bool)
        assert torch.equal(whiten(torch.ones(3), mask), torch.zeros(3))
        moments = masked_moments(torch.ones(3), mask)
        assert (moments.mean.item(), moments.variance.item()) == (0, 0)

    def test_the_dtype_stays(self):
        assert whiten(torch.ones(3)).dtype == torch.float32


class TestExplainedVariance:
    RETURNS = randoms(50)

    def of(self, values, parts=1):
        """Over ranks that hold so many tokens each."""
        moments = [
            Moments(*torch.stack([torch.stack(masked_moments(part)) for part in x.chunk(parts)]).sum(dim=0))
            for x in (self.RETURNS - values, self.RETURNS)
        ]
        return explained_variance(*moments).item()

    def test_it_is_1_for_a_perfect_critic_and_0_for_a_constant(self):
        assert self.of(self.RETURNS) == pytest.approx(1)
        assert self.of(torch.full_like(self.RETURNS, 7.0)) == pytest.approx(0)

    def test_a_critic_that_misleads_is_below_0(self):
        assert self.of(-self.RETURNS) == pytest.approx(-3)  # Var(2 R) / Var(R) = 4

    def test_half_the_spread_foreseen_is_three_quarters_of_the_variance(self):
        assert self.of(0.5 * self.RETURNS) == pytest.approx(0.75)

    def test_it_does_not_depend_on_the_split_over_ranks(self):
        values = randoms(50, seed=1)
        assert self.of(values, parts=4) == pytest.approx(self.of(values))

    @pytest.mark.parametrize("size", [0.0, 0.3, 1e4])
    def test_equal_returns_leave_nothing_to_foresee_whatever_the_critic_says(self, size):
        returns = size + 1e-8 * size * randoms(100, seed=2)  # but for rounding
        for values in (returns, randoms(100, seed=1)):
            moments = (masked_moments(returns - values), masked_moments(returns))
            assert explained_variance(*moments).item() == 0


BROADCASTING = {
    "one row": MASK[:1],
    "one column": MASK[:, :1],
    "zeros and ones": MASK.long(),
}


@pytest.mark.parametrize("mask", BROADCASTING.values(), ids=list(BROADCASTING))
@pytest.mark.parametrize(
    "function",
    [
        lambda x, mask: gae(ScoredRollout(x, x, mask), 1.0, 0.95),
        lambda x, mask: token_rewards(x[:, 0], x, 0.1, mask),
        lambda x, mask: whiten(x, mask),
        lambda x, mask: whiten(x, mask, moments=masked_moments(x)),
        lambda x, mask: masked_moments(x, mask),
        lambda x, mask: unpad_rows(x, mask),
    ],
    ids=["gae", "token_rewards", "whiten", "whiten with moments", "masked_moments", "unpad_rows"],
)
def test_a_mask_that_would_broadcast_is_refused(function, mask):
    with pytest.raises(ValueError, match=r"mask must be bool"):
        function(torch.zeros(4, 6), mask)


def test_gae_refuses_rewards_that_would_broadcast():
    with pytest.raises(
        ValueError, match=r"rollout.values must be \(B, T\), got \(4, 6\) beside rollout.token_rewards \(4, 1\)"
    ):
        gae(ScoredRollout(torch.zeros(4, 1), torch.zeros(4, 6), MASK), 1.0, 0.95)
