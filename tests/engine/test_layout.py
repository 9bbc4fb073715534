import itertools

import numpy as np
import pytest
import torch

from lit_rlhf.engine import layout
from lit_rlhf.engine.layout import MERGE_OVERHEAD, Sequences, make_layout, pairs, plan_buckets
from lit_rlhf.engine.packing import Example, pack


@pytest.mark.parametrize("seed", range(5))
def test_bucket_plan_is_the_cheapest_of_all_partitions(seed):
    lengths = np.random.default_rng(seed).integers(1, 30, 6)
    overhead = 150.0

    def cost(buckets):
        return sum(len(b) * max(lengths[i] for i in b) ** 2 + overhead for b in buckets)

    def partitions(items):
        if not items:
            yield []
            return
        head, *rest = items
        for partition in partitions(rest):
            yield [[head], *partition]
            for i, block in enumerate(partition):
                yield [*partition[:i], [head, *block], *partition[i + 1 :]]

    planned = as_lists(plan_buckets(lengths, overhead=overhead))
    assert sorted(itertools.chain.from_iterable(planned)) == list(range(6))
    assert cost(planned) == min(cost(p) for p in partitions(list(range(6))))


def test_of_responses_to_prompts_the_plan_counts_queries_too():
    lengths, queries, overhead = np.array([100, 102, 104, 400]), np.array([4, 90, 4, 4]), 0.0
    # By length alone each would have a bucket of its own; they have, and none is widened by its neighbour's queries.
    assert as_lists(plan_buckets(lengths, queries, overhead)) == [[0], [1], [2], [3]]
    more_than_any_saving = 4 * (400 + MERGE_OVERHEAD) * 90
    assert as_lists(plan_buckets(lengths, queries, more_than_any_saving)) == [[0, 1, 2, 3]]


def test_the_kernel_leaves_out_blocks_of_keys_that_no_query_sees():
    # Blocks of 512 x 512: all of the only one; three of four.
    assert pairs(np.array([512, 1024])).tolist() == [512**2, 3 * 512**2]
    assert pairs(np.array([72]), np.array([10])).tolist() == [(72 + MERGE_OVERHEAD) * 10]


def as_lists(plan):
    """The members of each bucket."""
    return [members.tolist() for members in plan]


def long_prompt(tokens, responses, first=1):
    """An example whose tokens are its nodes, if it stands alone."""
    ids = np.arange(first, first + tokens)
    ends = tokens + first + np.cumsum([0, *responses])
    return Example(ids, tuple(np.arange(*pair) for pair in itertools.pairwise(ends)))


def test_a_long_prompt_that_responses_share_is_attended_once_and_all_of_them_attend_to_it():
    batch = pack([long_prompt(1000, (3, 2), first=0)])
    shared = batch.layout.shared
    squares = [bucket.tolist() for bucket in shared.squares]
    assert squares == [[[1003, 1004, 0], [1000, 1001, 1002]], [list(range(1000))]]  # shortest first
    (answers,) = shared.answers
    assert answers.queries.tolist() == [[1000, 1001, 1002, 1003, 1004]]
    assert answers.positions.tolist() == [[1000, 1001, 1002, 1000, 1001]]
    assert answers.keys.tolist() == [list(range(1000))]
    assert answers.lengths.tolist() == [1000]
    assert shared.longest == 1003
    whole = torch.cat([bucket.flatten() for bucket in batch.layout.buckets])  # padded models still get whole sequences
    assert torch.equal(whole[batch.layout.source], torch.arange(1005))


@pytest.mark.parametrize(
    "examples",
    [
        [long_prompt(1000, (3,))],  # none shares it
        [long_prompt(4, (500, 500))],  # the merge would cost more than the prompt
        [long_prompt(20, (3, 3))],  # another call of the kernel would
    ],
)
def test_sequences_stay_whole_where_that_costs_less(examples):
    assert pack(examples).layout.shared is None


def test_every_node_stands_once_by_itself_and_once_more_with_its_prompt(monkeypatch):
    monkeypatch.setattr(layout, "SHARED_GAIN", float("inf"))  # whatever it costs
    examples = [long_prompt(*sizes) for sizes in ((300, (3, 9)), (2, (8, 8)), (17, (1, 4)), (30, (5, 5)))]
    batch = pack(examples)
    shared = batch.layout.shared
    assert len(shared.answers) == 2  # by length of the prompt
    nodes = torch.arange(len(batch.input_ids))
    assert torch.equal(cells(shared.squares)[shared.source], nodes)
    assert torch.equal(cells(answers.queries for answers in shared.answers)[shared.response_source], shared.responses)
    assert torch.equal(cells(answers.keys for answers in shared.answers)[shared.prompt_source], shared.prompts)
    assert torch.equal(torch.cat([shared.prompts, shared.responses]).sort().values, nodes)
    for answers in shared.answers:
        real = answers.queries > 0
        assert torch.equal(answers.positions[real], batch.position_ids[answers.queries[real]])


def cells(buckets):
    """Laid end to end."""
    return torch.cat([bucket.flatten() for bucket in buckets])


def test_a_layout_of_sequences_that_share_nothing_knows_no_prompts():
    assert make_layout(Sequences(np.arange(3004), np.array([3000, 4])), 3004).shared is None


def test_the_end_to_end_layout_lists_each_sequence_in_turn():
    batch = pack(
        [Example(np.array([5, 6]), (np.array([7]), np.array([8, 9]))), Example(np.array([3]), (np.array([4]),) * 2)]
    )
    nodes, bounds, longest, source = batch.layout.end_to_end
    rows = [batch.input_ids[nodes[start:end]].tolist() for start, end in itertools.pairwise(bounds.tolist())]
    assert sorted(rows) == [[3, 4], [3, 4], [5, 6, 7], [5, 6, 8, 9]]
    assert longest == 4
    assert bounds.dtype == torch.int32
    assert torch.equal(nodes[source], torch.arange(len(batch.input_ids)))


def test_the_padding_fraction_counts_cells_of_attention_without_a_token():
    batch = pack([Example(np.array([3]), (np.array([4]),)), Example(np.array([3]), (np.array([4, 5, 6]),))])
    assert len(batch.layout.buckets) == 1  # 2 + 4 tokens in a bucket of 2 x 4 cells
    assert batch.layout.padding_fraction() == 0.25
