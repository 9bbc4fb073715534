"""Groups of responses and their probabilities, against plain enumeration."""

import itertools
import math

import pytest
import torch

from lit_rlhf.oracle import GradientJudge, random_problem
from lit_rlhf.oracle.groups import listed_groups, own_slopes

LOGPROBS = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64).log()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_group_stands_for_all_orders_of_its_responses(size):
    groups, probabilities = listed_groups(LOGPROBS, size)
    slow = {}
    for order in itertools.product(range(4), repeat=size):
        key = tuple(sorted(order))
        slow[key] = slow.get(key, 0.0) + math.exp(sum(LOGPROBS[i].item() for i in order))
    assert dict(zip(map(tuple, groups.tolist()), probabilities.tolist(), strict=True)) == pytest.approx(slow)


def test_in_order_each_is_listed_by_itself():
    groups, probabilities = listed_groups(LOGPROBS, 2, ordered=True)
    assert groups.tolist() == [list(pair) for pair in itertools.product(range(4), repeat=2)]
    assert probabilities.view(4, 4).allclose(LOGPROBS.exp()[:, None] * LOGPROBS.exp())


def test_too_many_groups_are_refused_with_their_number():
    with pytest.raises(ValueError, match=r"4 responses make 268,435,456 groups of 14.*lower group_size"):
        listed_groups(LOGPROBS, 14, ordered=True)
    with pytest.raises(ValueError, match=r"group_size \(0\)"):
        listed_groups(LOGPROBS, 0)


JUDGE = GradientJudge(random_problem(3, 2, num_prompts=2), beta=0.1)


def test_groups_are_of_one_prompt_and_their_weights_sum_to_one():
    groups, C = JUDGE.groups(2), JUDGE.problem.tree.num_completions
    assert groups.group_size == 2
    assert groups.weights.sum().item() == pytest.approx(1)
    prompts = (groups.rows // C).view(-1, 2)
    assert (prompts[:, 0] == prompts[:, 1]).all()
    assert prompts.unique().tolist() == [0, 1]
    responses = JUDGE.problem.tree.completions[groups.rows % C]
    assert torch.equal(groups.response_ids, responses)


def test_a_loss_of_ones_own_sees_one_group_at_a_time():
    groups = JUDGE.groups(3)
    for group in groups.one_by_one():
        assert (len(group.rows), group.group_size) == (3, 3)
        assert group.weights.sum().item() == pytest.approx(1)
    slopes = own_slopes(groups, lambda group: (group.scores[:, None] * group.logprobs).sum())
    assert torch.equal(slopes, groups.scores[:, None].expand_as(slopes))


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda group: group.logprobs.sum(1), r"not \(2,\)"),
        (lambda group: group.scores.sum(), r"not \(\) without a gradient"),
        (lambda group: 1.0, "not float"),
    ],
)
def test_what_is_no_loss_is_refused(loss, said):
    with pytest.raises(ValueError, match=rf"a loss must give a scalar tensor that depends on logprobs, {said}"):
        own_slopes(JUDGE.groups(2), lambda group: loss(group))
