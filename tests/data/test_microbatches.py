import numpy as np

from lit_rlhf.data.microbatches import Plan, flat


def test_a_plan_makes_each_micro_batch_of_its_own_rows_and_a_part_of_it_keeps_the_order():
    rows, ends = flat([[3, 1], [2], [0, 5, 4]])
    assert rows.tolist() == [3, 1, 2, 0, 5, 4] and ends.tolist() == [0, 2, 3, 6]
    plan = Plan(rows, ends, np.array([2.0, 1.0, 3.0]))
    assert [batch.indices.tolist() for batch in plan] == [[3, 1], [2], [0, 5, 4]]
    assert [batch.denominator for batch in plan] == [2.0, 1.0, 3.0] and len(plan) == 3
    assert [batch.indices.tolist() for batch in plan[1::1]] == [[2], [0, 5, 4]]
    assert [batch.indices.tolist() for batch in plan[0::2][1:]] == [[0, 5, 4]]
    assert plan[-1].step is None
