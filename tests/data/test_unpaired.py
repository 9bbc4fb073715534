"""Completions with labels, and the others that stand behind their prompts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf import UnpairedDataModule, UserError
from lit_rlhf.data.microbatches import MicroBatch
from lit_rlhf.data.unpaired import partners
from tests.data.small_rows import WORDS, attach, write
from tests.tiny_tokenizers import word_tokenizer

ROWS = [
    {"prompt": "how so", "completion": " yes", "label": True},
    {"prompt": "so", "completion": " no no", "label": False},
    {"prompt": "very", "chosen": " it is", "rejected": " no"},
]


def module(tmp_path, rows=ROWS, **options):
    source = write(tmp_path / "rows.jsonl", rows)
    return UnpairedDataModule(source, None, tokenizer=word_tokenizer(WORDS), **{"batch_size": 9} | options)


def texts(tokenizer, packed):
    """Prompt and response of each sequence."""
    said = []
    for number in range(packed.num_sequences):
        mine = packed.sequence_ids == number
        targets = tokenizer.convert_ids_to_tokens(packed.target_ids[mine].tolist())
        first = packed.predictors[mine][0]
        length = packed.position_ids[first] + 1
        prompt = tokenizer.convert_ids_to_tokens(packed.input_ids[first - length + 1 : first + 1].tolist())
        said.append(("".join(prompt), "".join(targets)))
    return said


def test_completions_become_a_packed_batch_with_their_labels_and_pairs_share_their_prompt(tmp_path):
    data = attach(module(tmp_path, shuffle=False))
    [batch] = data.train_dataloader()
    assert batch.packed.num_sequences == 4 and batch.denominator.item() == 4
    assert batch.row_ids.tolist() == [0, 1, 2, 3], "first every row's first completion, then the pair's second"
    assert batch.desirable.tolist() == [True, False, True, False]
    assert texts(data.tokenizer, batch.packed)[:3] == [
        ("how so", " yes<eos>"),
        ("so", " no no<eos>"),
        ("very", " it is<eos>"),
    ]
    # prompts of 2, 1 and 1; completions of 2, 3, 3 and 2 with the end token; one prompt is stored for two
    assert len(batch.packed.input_ids) == 4 + 10
    assert data.num_rows("train") == 4


def test_behind_each_prompt_stand_as_many_completions_of_others_each_once(tmp_path):
    data = attach(module(tmp_path))
    [batch] = data.train_dataloader()
    [mismatched] = batch.mismatched
    own, others = texts(data.tokenizer, batch.packed), texts(data.tokenizer, mismatched.packed)
    assert [prompt for prompt, _ in own] == [prompt for prompt, _ in others]
    assert sorted(answer for _, answer in own) == sorted(answer for _, answer in others)
    assert not set(own) & set(others)
    assert mismatched.row_ids.tolist() == batch.row_ids.tolist()


def test_the_first_micro_batch_of_a_step_brings_the_mismatched_of_all_and_the_next_none(tmp_path):
    data = attach(module(tmp_path, ROWS * 2, batch_size=1), accumulate_grad_batches=4)
    batches = list(data.train_dataloader())
    assert [len(batch.mismatched) for batch in batches] == [4, 0, 0, 0, 2, 0]
    for first, step in ((0, batches[:4]), (4, batches[4:])):
        assert [m.row_ids.tolist() for m in batches[first].mismatched] == [b.row_ids.tolist() for b in step]
    assert all(len(batch.mismatched) == 1 for batch in data.rows_dataloader("train"))


def test_of_rows_out_of_which_a_batch_is_made_by_hand_each_stands_by_itself(tmp_path):
    dataset = attach(module(tmp_path)).datasets["train"]
    batch = dataset[MicroBatch(np.array([2, 0]), 1.0)]
    assert batch.row_ids.tolist() == [2, 0, 3] and batch.desirable.tolist() == [True, True, False]
    assert len(batch.mismatched) == 1


@pytest.mark.parametrize(("max_length", "longest"), [(None, 10 + 10), (12, 12)])
def test_a_long_completion_behind_a_long_prompt_is_cut_to_the_length_that_rows_may_have(tmp_path, max_length, longest):
    rows = [
        {"prompt": "how" + " so" * 9, "completion": " yes", "label": True},
        {"prompt": "so", "completion": " no" * 9, "label": False},
    ]
    [batch] = attach(module(tmp_path, rows, max_length=max_length)).train_dataloader()
    assert batch.mismatched[0].packed.position_ids.max() == longest - 1


@given(st.lists(st.integers(0, 5), min_size=2, max_size=40))
def test_partners_are_a_permutation_without_a_prompt_of_its_own(prompts):
    numbers = np.unique(prompts, return_inverse=True)[1]
    if 2 * np.bincount(numbers).max() > len(numbers):
        with pytest.raises(UserError, match=r"completions are of one prompt: .* give rows of more prompts"):
            partners(numbers)
        return
    found = partners(numbers)
    assert sorted(found) == list(range(len(numbers)))
    assert (numbers[found] != numbers).all()


def test_completions_of_one_prompt_alone_are_refused(tmp_path):
    rows = [{"prompt": "so", "completion": answer, "label": answer == " yes"} for answer in (" yes", " no", " it")]
    with pytest.raises(UserError, match=r"^3 of 3 completions are of one prompt"):
        attach(module(tmp_path, rows))
