import numpy as np
import pytest
import torch

from lit_rlhf.rollout.experience import Experience, PlannedRollout, episode_means, repetition
from lit_rlhf.rollout.play import Play
from token_mdp import Episode, FinishReason

COLUMNS = ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns")
LENGTHS = (3, 1, 2, 4)


def experience(plan, step_sizes):
    """Four episodes; the columns of token t of episode i hold 100 c + 10 i + t, c being the column."""
    return Experience(
        prompt_ids=[np.arange(1, 3 + i) for i in range(4)],
        response_ids=[10 * i + np.arange(length) for i, length in enumerate(LENGTHS)],
        tokens={
            name: [100.0 * c + 10 * i + torch.arange(length) for i, length in enumerate(LENGTHS)]
            for c, name in enumerate(COLUMNS)
        },
        plan=[[np.array(part)[:, None] for part in step] for step in plan],
        step_sizes=step_sizes,
    )


PLAN = [[[2, 0], [3, 1]], [[1, 3], [0, 2]]]  # two steps of two micro-batches, as of two passes


@pytest.mark.parametrize("number", range(4))
def test_the_columns_of_a_micro_batch_belong_to_its_tokens(number):
    batch = experience(PLAN, [10.0, 10.0]).micro_batch(number, num_ranks=1)
    episodes = PLAN[number // 2][number % 2]
    expected = torch.cat([10.0 * i + torch.arange(LENGTHS[i]) for i in episodes])
    assert batch.packed.target_ids.tolist() == expected.tolist()
    for c, name in enumerate(COLUMNS):
        assert torch.equal(getattr(batch, name), expected + 100.0 * c)


def test_the_denominators_of_a_step_add_up_to_its_tokens_over_ranks_and_micro_batches():
    scored = experience(PLAN, [25.0, 15.0])  # over two ranks, of which this one has 10 tokens
    shares = [scored.micro_batch(number, num_ranks=2).denominator.item() for number in range(4)]
    assert shares == [25 / 4, 25 / 4, 15 / 4, 15 / 4]


def test_a_limit_keeps_the_first_episodes_of_a_micro_batch():
    batch = experience(PLAN, [10.0, 10.0]).micro_batch(1, num_ranks=1, limit=1)
    assert batch.packed.target_ids.tolist() == [30, 31, 32, 33] and batch.old_logprobs.tolist() == [30, 31, 32, 33]


def test_a_restored_experience_gives_the_same_micro_batches_and_its_state_is_its_own(tmp_path):
    scored = experience(PLAN, [10.0, 10.0])
    torch.save(scored.state_dict(), tmp_path / "state")
    for column in scored.state_dict()["tokens"].values():
        column[0].zero_()  # of a state; the experience goes on as it is
    restored = Experience.from_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for number in range(4):
        ours, theirs = (e.micro_batch(number, num_ranks=1) for e in (restored, scored))
        assert torch.equal(ours.packed.input_ids, theirs.packed.input_ids)
        assert all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in (*COLUMNS, "denominator"))


def planned(plan=PLAN):
    """Four episodes as `experience` has them, played but not scored."""
    episodes = [
        Episode(i, 9 - i, np.arange(1, 3 + i), 10 * i + np.arange(n), FinishReason.STOP, float(i), {}, None)
        for i, n in enumerate(LENGTHS)
    ]
    sampled = [np.full(n, -1.0 * i) for i, n in enumerate(LENGTHS)]
    return PlannedRollout(Play(episodes, sampled), [[np.array(part)[:, None] for part in step] for step in plan], 1)


def test_a_planned_rollout_is_in_the_order_of_its_first_pass():
    rollout = planned()
    assert [episode.episode_id for episode in rollout.episodes] == [2, 0, 3, 1]
    assert rollout.lengths.tolist() == [2, 3, 4, 1] and rollout.prompt_index.tolist() == [7, 9, 6, 8]
    assert rollout.mask.tolist() == [[t < n for t in range(4)] for n in (2, 3, 4, 1)]
    packed = [batch.target_ids.tolist() for batch in rollout.micro_batches()]
    assert packed == [[20, 21, 0, 1, 2], [30, 31, 32, 33, 10]]
    assert rollout.step_tokens().tolist() == [10.0, 10.0]


def test_rows_of_episodes_and_columns_of_tokens_are_two_forms_of_one():
    rollout, flat = planned(), torch.arange(1.0, 11.0)
    rows = rollout.rows(flat)
    assert rows.tolist() == [[1, 2, 0, 0], [3, 4, 5, 0], [6, 7, 8, 9], [10, 0, 0, 0]]
    assert torch.equal(rollout.flat(rows), flat)


@pytest.mark.parametrize("first", [[[2, 0], [3, 1]], [[0, 1], [2, 3]], [[1, 3], [0, 2]]])
def test_what_is_learnt_goes_with_the_episode_that_it_is_of_whatever_the_order(first):
    rollout = planned([first, PLAN[1]])
    column = torch.cat([10.0 * i + torch.arange(LENGTHS[i]) for i in rollout.order])
    learnt = rollout.experience({name: column for name in COLUMNS}, [10.0, 10.0])
    for number in range(4):
        batch = learnt.micro_batch(number, num_ranks=1)
        assert batch.advantages.tolist() == batch.packed.target_ids.tolist()


def groups(rows):
    """Four episodes in two groups of one prompt each, learnt from in these rows."""
    prompts = [np.array([1, 2]), np.array([1, 2]), np.array([3, 4, 5]), np.array([3, 4, 5])]
    episodes = [
        Episode(i, i // 2, prompts[i], 10 * i + np.arange(n), FinishReason.STOP, float(i), {}, None)
        for i, n in enumerate(LENGTHS)
    ]
    sampled = [np.zeros(n) for n in LENGTHS]
    return PlannedRollout(Play(episodes, sampled), [[np.array(rows)]], 1, group_size=2)


def test_a_prompt_is_packed_once_for_those_that_share_it_and_each_token_keeps_its_columns():
    rollout = groups([[2, 3], [0, 1]])
    assert rollout.order.tolist() == [2, 0, 3, 1]  # as `pack` lays them: the first of each prompt, then the second
    assert rollout.group_index.tolist() == [1, 0, 1, 0]
    (packed,) = rollout.micro_batches()
    assert packed.input_ids.tolist() == [3, 4, 5, 20, 21, 30, 31, 32, 33, 1, 2, 0, 1, 2, 10]
    assert packed.target_ids.tolist() == [20, 21, 0, 1, 2, 30, 31, 32, 33, 10]
    learnt = rollout.experience({name: packed.target_ids.float() for name in COLUMNS}, [10.0])
    batch = learnt.micro_batch(0, num_ranks=1)
    assert batch.advantages.tolist() == batch.packed.target_ids.tolist() == packed.target_ids.tolist()
    assert learnt.micro_batch(0, num_ranks=1, limit=1).packed.target_ids.tolist() == [20, 21, 30, 31, 32, 33]


def test_a_plan_of_before_groups_is_restored():
    state = experience(PLAN, [10.0, 10.0]).state_dict()
    state["plan"] = [[rows[:, 0] for rows in step] for step in state["plan"]]
    batch = Experience.from_state_dict(state).micro_batch(0, num_ranks=1)
    assert batch.packed.target_ids.tolist() == [20, 21, 0, 1, 2]


def test_groups_whose_scores_are_all_equal_are_counted():
    rollout, tokens = groups([[2, 3], [0, 1]]), torch.zeros(10)
    for scores, share in (([1.0, 1.0, 2.0, 1.0], 0.5), ([0.0] * 4, 1.0), ([1.0, 1.0, 2.0, 2.0], 0.0)):
        means = rollout.means(torch.tensor(scores), tokens, tokens)  # of episodes 2, 0, 3, 1
        assert means["rollout/equal_groups"].item() == share
    assert "rollout/equal_groups" not in planned().means(torch.zeros(4), tokens, tokens)


def test_the_gap_of_the_sampler_is_over_the_tokens_that_it_sampled():
    rollout = planned()
    sampled = torch.cat([torch.full((LENGTHS[i],), -1.0 * i) for i in rollout.order])
    means = rollout.means(torch.zeros(4), sampled - 0.5, sampled - 0.5 - 2.0)
    assert means["rollout/sampler_gap"].item() == pytest.approx(0.5)
    assert means["rollout/kl"].item() == pytest.approx(2.0 * 10 / 4)  # summed over each response


def test_means_of_episodes_by_hand():
    ends = [(1.0, 2, FinishReason.STOP, 4.0), (4.0, 5, FinishReason.LENGTH, 2.0), (1.0, 2, FinishReason.STOP, 0.0)]
    episodes = [
        Episode(i, i, np.array([1]), np.zeros(length, int), reason, reward, {"length": component}, None)
        for i, (reward, length, reason, component) in enumerate(ends)
    ]
    means = {name: mean.item() for name, mean in episode_means(episodes).items()}
    assert means == pytest.approx(
        {"score": 2.0, "response_length": 3.0, "eos_fraction": 2 / 3, "repeated_fraction": 1 / 6, "length": 2.0}
    )


def test_repetition_is_the_share_of_runs_of_four_tokens_that_have_stood_before():
    assert repetition(np.array([1, 2, 3])) == repetition(np.arange(9)) == 0
    assert repetition(np.full(13, 7)) == pytest.approx(9 / 10)  # ten runs, all of them the first
    assert repetition(np.array([1, 2, 3, 4, 9, 1, 2, 3, 4])) == pytest.approx(1 / 6)
