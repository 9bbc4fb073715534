import numpy as np
import pytest
import torch

from lit_rlhf.models.decoder import NOBODY, Decoder, in_order
from lit_rlhf.models.decoding import SlotDecoder
from tests.tiny import plain_logits, tiny_policy


class Told(Decoder):
    """Keeps what it is asked for; the logits of slot s are s."""

    def __init__(self, num_slots, max_length):
        super().__init__(tiny_policy(), num_slots, max_length)
        self.asked = []

    def _keep(self, slots):
        self.asked.append(("keep", *slots.tolist()))

    def _prefill(self, slots, input_ids, lengths):
        self.asked.append(("prefill", *slots.tolist()))
        return torch.as_tensor(slots)[:, None]

    def _decode(self, slots, num_active, input_ids, lengths):
        self.asked.append(("decode", *slots.tolist(), "of", num_active))
        return torch.as_tensor(slots)[:, None]


@pytest.mark.parametrize("told", [False, True])
def test_slots_that_grew_by_a_token_go_on_and_all_others_begin_anew(told):
    decoder, ids, lengths = Told(4, 8), np.full((4, 8), 5), np.array([3, 4, 3, 2])
    episodes = np.arange(4) if told else None
    everyone, three = np.ones(4, bool), np.array([True, True, False, True])
    assert decoder.logits(ids, lengths, everyone, episodes)[:, 0].tolist() == [0, 1, 2, 3]
    ids[1, 0] = 9  # another prompt, one token longer by chance
    if told:
        episodes[1] = 7
    assert decoder.logits(ids, lengths + 1, three, episodes)[:, 0].tolist() == [0, 1, 3]
    decoder.logits(ids, lengths + 2, everyone, episodes)  # the parked one is no longer known
    decoder.clear()
    decoder.logits(ids, lengths + 3, everyone, episodes)
    assert decoder.asked == [
        ("keep", 0, 1, 2, 3),
        ("prefill", 0, 1, 2, 3),
        ("keep", 0, 1, 3),
        ("prefill", 1),
        ("decode", 0, 3, "of", 3),
        ("keep", 0, 1, 2, 3),
        ("prefill", 2),
        ("decode", 0, 1, 3, "of", 4),
        ("keep", 0, 1, 2, 3),
        ("prefill", 0, 1, 2, 3),
    ]


class Lending(Told):
    """Of which slots lend to each other."""

    lends = True

    def _lend(self, lender, slot, length):
        self.asked.append(("lend", lender, slot, length))


def test_of_slots_of_one_group_one_computes_the_prompt_and_lends_it_to_the_others():
    decoder, ids, lengths = Lending(5, 9), np.full((5, 9), 5), np.array([3, 3, 3, 4, 4])
    episodes, groups = np.arange(5), np.array([0, 0, 0, 1, 1])
    assert decoder.logits(ids, lengths, None, episodes, groups)[:, 0].tolist() == [0, 1, 2, 3, 4]
    lengths += 1
    # Slot 0 goes on; 1 begins another of its group, 2 one of a new group, 3 one of that which 2 has left, 4 goes on.
    episodes[1:4], groups[1:4], lengths[1:4] = [5, 6, 7], [0, 2, 0], [3, 2, 3]
    assert decoder.logits(ids, lengths, None, episodes, groups)[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert [asked for asked in decoder.asked if asked[0] != "keep"] == [
        ("prefill", 0, 3),
        ("lend", 0, 1, 2),
        ("lend", 0, 2, 2),
        ("lend", 3, 4, 3),
        ("decode", 1, 2, 4, "of", 5),
        ("prefill", 2),
        ("lend", NOBODY, 1, 2),
        ("lend", 0, 3, 2),
        ("decode", 0, 1, 3, 4, "of", 5),
    ]
    decoder.clear()
    decoder.asked.clear()
    decoder.logits(ids, lengths, None, episodes, groups)
    assert decoder.asked[1] == ("prefill", 0, 2, 4)


def test_without_groups_and_where_slots_do_not_lend_each_computes_its_prompt():
    for kind, groups in ((Lending, None), (Told, np.zeros(3, int))):
        decoder = kind(3, 8)
        decoder.logits(np.full((3, 8), 5), np.array([3, 3, 3]), None, np.arange(3), groups)
        assert decoder.asked[1:] == [("prefill", 0, 1, 2)]


def test_parts_come_out_in_the_order_of_their_rows():
    parts = [(np.array([3, 0]), torch.tensor([[3.0], [0.0]])), (np.array([1, 2]), torch.tensor([[1.0], [2.0]]))]
    assert in_order(parts)[:, 0].tolist() == [0, 1, 2, 3]
    assert in_order([(np.array([1, 0]), torch.tensor([[1.0], [0.0]]))])[:, 0].tolist() == [0, 1]


def test_a_refill_that_is_one_token_longer_than_the_cached_row_is_prefilled():
    policy = tiny_policy()
    decoder = SlotDecoder(policy, 1, 8)
    ids = np.array([[5, 6, 7, 0, 0, 0, 0, 0]])
    decoder.logits(ids, np.array([3]))
    other = np.array([[9, 6, 7, 8, 0, 0, 0, 0]])  # length 4 = 3 + 1, but another prompt
    with torch.no_grad():
        expected = plain_logits(policy.model, other[0, :4])[-1:]
    torch.testing.assert_close(decoder.logits(other, np.array([4])), expected, rtol=1e-4, atol=1e-4)
