import itertools

import numpy as np
import pytest
import torch

from lit_rlhf.engine import layout
from lit_rlhf.engine.layout import MASKED_CELL, Sequences, make_layout, plan_buckets
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


def test_of_continuations_the_plan_counts_queries_under_a_mask():
    lengths, queries, overhead = np.array([100, 102, 104, 400]), np.array([4, 90, 4, 4]), 0.0
    # By length alone each would have a bucket of its own; they have, and none is widened by its neighbour's queries.
    assert as_lists(plan_buckets(lengths, queries, overhead)) == [[0], [1], [2], [3]]
    more_than_any_saving = MASKED_CELL * 4 * 400 * 90
    assert as_lists(plan_buckets(lengths, queries, more_than_any_saving)) == [[0, 1, 2, 3]]


def as_lists(plan):
    """The members of each bucket."""
    return [members.tolist() for members in plan]


def long_prompt(tokens, responses, first=1):
    """An example whose tokens are its nodes, if it stands alone."""
    ids = np.arange(first, first + tokens)
    ends = tokens + first + np.cumsum([0, *responses])
    return Example(ids, tuple(np.arange(*pair) for pair in itertools.pairwise(ends)))


def test_a_long_prompt_that_responses_share_is_attended_once_and_each_response_to_it():
    batch = pack([long_prompt(1000, (3, 2), first=0)])
    shared = batch.layout.shared
    assert [bucket.tolist() for bucket in shared.buckets] == [[list(range(1000))]]
    (part,) = shared.continuations
    assert part.queries.tolist() == [[1003, 1004, 0], [1000, 1001, 1002]]  # shortest first
    assert part.keys[:, 999:].tolist() == [[999, 1003, 1004, 0], [999, 1000, 1001, 1002]]
    assert part.starts.tolist() == [1000, 1000]
    cells = torch.cat([*(bucket.flatten() for bucket in shared.buckets), part.queries.flatten()])
    assert torch.equal(cells[shared.source], torch.arange(1005))
    whole = torch.cat([bucket.flatten() for bucket in batch.layout.buckets])  # padded models still get whole sequences
    assert torch.equal(whole[batch.layout.source], torch.arange(1005))


@pytest.mark.parametrize(
    "examples",
    [
        [long_prompt(1000, (3,))],  # none shares it
        [long_prompt(4, (500, 500))],  # masks would cost more than the prompt
        [long_prompt(20, (3, 3))],  # another call of the kernel would
    ],
)
def test_sequences_stay_whole_where_that_costs_less(examples):
    assert pack(examples).layout.shared is None


def test_beside_a_shared_prompt_others_stay_whole():
    batch = pack([long_prompt(1000, (3, 3), first=0), long_prompt(2, (300, 300))])
    assert sorted(bucket.shape for bucket in batch.layout.shared.buckets) == [(1, 1000), (2, 302)]
    assert [part.queries.shape for part in batch.layout.shared.continuations] == [(2, 3)]


def test_shared_or_whole_every_node_has_a_cell_of_its_own(monkeypatch):
    monkeypatch.setattr(layout, "SHARED_GAIN", float("inf"))  # whatever it costs
    examples = [long_prompt(*sizes) for sizes in ((30, (3, 9)), (2, (8, 8)), (17, (1, 4)), (30, (5, 5)))]
    batch = pack(examples)
    shared = batch.layout.shared
    cells = torch.cat([b.flatten() for b in (*shared.buckets, *(part.queries for part in shared.continuations))])
    assert torch.equal(cells[shared.source], torch.arange(len(batch.input_ids)))


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
