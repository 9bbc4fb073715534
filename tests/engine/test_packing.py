import numpy as np
import pytest
import torch

from lit_rlhf.engine.packing import Example, pack
from tests.tiny import random_examples, tiny_policy


def test_a_prompt_shared_by_two_responses_is_packed_once():
    #                       prompt     chosen  rejected
    batch = pack([Example(np.array([5, 6, 7]), (np.array([8]), np.array([9, 2])))])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 2]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 3, 4]
    assert batch.predictors.tolist() == [2, 2, 4]  # token 7 predicts both 8 and 9, then 9 predicts 2
    assert batch.target_ids.tolist() == [8, 9, 2]
    assert batch.sequence_ids.tolist() == [0, 1, 1]
    assert batch.last_nodes.tolist() == [3, 5]


def test_chosen_and_rejected_split_by_chunk():
    examples = [Example(np.array([3]), (np.array([10 + i]), np.array([20 + i]))) for i in range(3)]
    batch = pack(examples)
    chosen, rejected = batch.sum_by_sequence(batch.target_ids.float()).chunk(2)
    assert chosen.tolist() == [10, 11, 12]
    assert rejected.tolist() == [20, 21, 22]


def test_examples_may_differ_in_their_number_of_responses():
    pair = Example(np.array([3, 4]), (np.array([10]), np.array([20, 21])))
    single = Example(np.array([5]), (np.array([11, 12]),))
    batch = pack([pair, single])
    assert batch.input_ids.tolist() == [3, 4, 10, 20, 21, 5, 11, 12]
    assert batch.position_ids.tolist() == [0, 1, 2, 2, 3, 0, 1, 2]
    assert batch.target_ids.tolist() == [10, 11, 12, 20, 21], "first every example's first response, then the second"
    assert batch.sequence_ids.tolist() == [0, 1, 1, 2, 2] and batch.last_nodes.tolist() == [2, 7, 4]
    policy = tiny_policy()
    together = batch.sum_by_sequence(policy(batch)[0])
    alone = [
        pack([Example(e.prompt_ids, (r,))]) for e, r in ((pair, 0), (single, 0), (pair, 1)) for r in [e.responses[r]]
    ]
    apart = torch.cat([part.sum_by_sequence(policy(part)[0]) for part in alone])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_masked_response_tokens_are_read_by_attention_but_not_by_the_loss():
    prompt, response = np.array([5, 6]), np.array([7, 8, 9])
    mask = np.array([False, True, True])  # the loss skips 7
    policy = tiny_policy()
    masked, _ = policy(pack([Example(prompt, (response,), (mask,))]))
    full, _ = policy(pack([Example(prompt, (response,))]))
    torch.testing.assert_close(masked, full[1:])


def test_the_last_token_of_a_sequence_never_predicts_the_first_of_the_next():
    batch = pack(random_examples(6, responses=2))
    assert not set(batch.predictors.tolist()) & set(batch.last_nodes.tolist())


def test_packing_refuses_what_it_cannot_place():
    with pytest.raises(ValueError, match="example 1 has an empty prompt or response"):
        pack([Example(np.array([3]), (np.array([4]),)), Example(np.array([3]), (np.array([], dtype=int),))])
