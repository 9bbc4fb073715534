import pytest
import torch

from lit_rlhf import RewardShaping, UserError
from lit_rlhf.losses.advantages import masked_moments

REWARDS = torch.tensor([1.0, 5.0, -3.0, 2.0])
LENGTHS = torch.tensor([2, 4, 6, 8])
CUT = torch.tensor([False, True, False, True])


def shape(rewards=REWARDS, rollouts=1, **options):
    """Scores of a rollout after it has been observed so many times."""
    shaping = RewardShaping(**options)
    for _ in range(rollouts):
        shaping.observe(masked_moments(rewards))
    return shaping.scores(rewards, LENGTHS, CUT)


def test_by_default_nothing_is_done():
    assert torch.equal(shape(), REWARDS)


def test_clipping_holds_scores_within_both_bounds():
    assert shape(clip=2.0).tolist() == [1.0, 2.0, -2.0, 2.0]


def test_the_missing_end_penalty_is_subtracted_and_the_missing_end_score_replaces():
    assert shape(missing_end_penalty=10.0).tolist() == [1.0, -5.0, -3.0, -8.0]
    assert shape(missing_end_score=-1.0).tolist() == [1.0, -1.0, -3.0, -1.0]


def test_a_replaced_score_stays_what_it_was_set_to_whatever_else_is_done():
    scores = shape(missing_end_score=-1.0, clip=0.5, length_penalty=1.0, normalize="scale")
    assert scores[CUT].tolist() == [-1.0, -1.0]


def test_only_tokens_past_the_budget_cost():
    # lengths 2, 4, 6, 8 past 5: 0, 0, 1, 3 tokens at 0.5
    assert shape(length_penalty=0.5, length_budget=5).tolist() == [1.0, 5.0, -3.5, 0.5]
    assert shape(length_penalty=0.5).tolist() == [0.0, 3.0, -6.0, -2.0]


def test_standardize_gives_mean_0_and_variance_1_and_scale_keeps_signs():
    standardized, scaled = shape(normalize="standardize"), shape(normalize="scale")
    assert standardized.mean().item() == pytest.approx(0, abs=1e-6)
    assert standardized.var(correction=0).item() == pytest.approx(1)
    assert torch.equal(scaled.sign(), REWARDS.sign())
    assert scaled.var(correction=0).item() == pytest.approx(1)


def test_statistics_run_over_all_rollouts_so_far():
    shaping = RewardShaping(normalize="standardize")
    first, second = torch.tensor([0.0, 2.0]), torch.tensor([4.0, 6.0])
    for rewards in (first, second):
        shaping.observe(masked_moments(rewards))
    # all four: mean 3, variance (9 + 1 + 1 + 9) / 4 = 5
    scores = shaping.scores(second, torch.ones(2), torch.zeros(2, dtype=torch.bool))
    assert scores.tolist() == pytest.approx([1 / 5**0.5, 3 / 5**0.5])


def test_clipping_comes_after_normalisation():
    # mean 1.25, variance 8.1875: (5 - 1.25) / 2.8614 = 1.3106 is clipped, (1 - 1.25) / 2.8614 = -0.0874 is not
    assert shape(normalize="standardize", clip=1.0).tolist() == pytest.approx([-0.0874, 1.0, -1.0, 0.2621], abs=1e-4)


@pytest.mark.parametrize("normalize", ["scale", "standardize"])
def test_equal_rewards_are_not_blown_up(normalize):
    scores = shape(torch.full((4,), 0.3), rollouts=7, normalize=normalize)
    assert scores.abs().max() <= 0.31


def test_restored_statistics_go_on_where_they_stopped():
    first, second = RewardShaping(normalize="standardize"), RewardShaping(normalize="standardize")
    first.observe(masked_moments(REWARDS))
    second.load_state_dict(first.state_dict())
    for shaping in (first, second):
        shaping.observe(masked_moments(REWARDS + 7))
    assert torch.equal(first.scores(REWARDS, LENGTHS, CUT), second.scores(REWARDS, LENGTHS, CUT))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"normalize": "whiten"}, "normalize"),
        ({"clip": 0.0}, "clip"),
        ({"length_penalty": -1.0}, "length_penalty"),
        ({"length_penalty": float("nan")}, r"length_penalty \(nan\)"),
        ({"length_penalty": 1.0, "length_budget": -1}, r"length_budget \(-1\)"),
        ({"missing_end_penalty": -1.0}, "missing_end_penalty"),
        ({"missing_end_penalty": float("nan")}, r"missing_end_penalty \(nan\)"),
        ({"missing_end_score": float("nan")}, r"missing_end_score \(nan\)"),
        ({"missing_end_score": float("-inf")}, r"missing_end_score \(-inf\)"),
        ({"length_budget": 5}, r"length_budget \(5\) .* length_penalty"),
        ({"missing_end_penalty": 1.0, "missing_end_score": -1.0}, r"missing_end_penalty \(1.0\) .* missing_end_score"),
    ],
)
def test_options_that_mean_nothing_are_refused_by_name(options, words):
    with pytest.raises(UserError, match=words):
        RewardShaping(**options)
