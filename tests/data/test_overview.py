import numpy as np
import pytest

from lit_rlhf import PreferenceDataModule, RolloutDataModule, SFTDataModule, StepwiseDataModule
from lit_rlhf.data.overview import BINS, Lengths, overview
from lit_rlhf.models.tokens import tokenizer_beside
from tests.data.small_rows import write

pytestmark = pytest.mark.filterwarnings("ignore:(train|validation) (data|prompts)")
TOKENIZER = tokenizer_beside("demo")


def loaded(cls, tmp_path, train, validation, **options):
    sources = {name: write(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", train), ("b", validation))}
    data = cls(train=sources["a"], validation=sources["b"], tokenizer=TOKENIZER, **options)
    data.setup("fit")
    return data


def sft(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def test_each_row_is_whole_cut_dropped_or_not_taken_and_what_an_epoch_takes_is_counted(tmp_path):
    short, long = sft("Hello.", " Good day!"), sft("Hello.", " Good day!" * 20)
    far = {"prompt": "Hello. " * 30, "completion": " Good day!"}
    source = write(tmp_path / "a.jsonl", [short, short, long, far, sft("Hello.", "")])
    sources = [{"source": source, "weight": 2.0}, {"source": write(tmp_path / "b.jsonl", [short] * 4), "weight": 0.5}]
    data = SFTDataModule(train=sources, validation=None, tokenizer=TOKENIZER, max_length=20)
    data.setup("fit")
    dataset = data.datasets["train"]
    found, _ = overview(dataset, dataset.reports)
    first, second = found.sources
    assert (first.read, first.whole, first.cut, first.not_taken, first.empty) == (5, 3, 1, 0, 1)
    assert sum(first.dropped.values()) == 1 and "whose prompt alone" in next(iter(first.dropped))
    assert (second.source, second.read, second.whole, second.not_taken) == (str(tmp_path / "b.jsonl"), 4, 4, 2)
    assert found.examples == 2 * 4 + 2 == len(dataset)
    batches = list(data.train_dataloader())
    assert found.tokens == sum(len(batch.packed.input_ids) for batch in batches)
    assert found.learnt == sum(len(batch.packed.target_ids) for batch in batches)
    assert found.repeated == 1 + 2  # of distinct rows that are taken: a weight of 2 repeats nothing
    assert found.in_train is None


def test_rows_and_prompts_of_the_training_data_are_found_in_others(tmp_path):
    train = [sft("Hello.", " Good day!"), sft("Thanks.", " Bye!"), {"text": "Good day!"}]
    held = [sft("Hello.", " Good day!"), sft("Thanks.", " No."), sft("Who?", " No."), {"text": "Good evening!"}]
    data = loaded(SFTDataModule, tmp_path, train, held)
    datasets = data.datasets
    _, contents = overview(datasets["train"], datasets["train"].reports)
    found, _ = overview(datasets["validation"], datasets["validation"].reports, train=contents)
    assert (found.in_train, found.prompts_in_train) == (1, 2)  # texts have no prompt that could be the same


def test_lengths_are_those_of_the_parts_and_pairs_are_scored_twice(tmp_path):
    pair = {"prompt": "Hello.", "chosen": " Good day!", "rejected": " No."}
    data = loaded(PreferenceDataModule, tmp_path, [pair, {**pair, "chosen": " Bye!"}], [pair])
    dataset = data.datasets["train"]
    found, _ = overview(dataset, dataset.reports, ends=2)
    batch = next(iter(data.train_dataloader())).packed
    assert found.learnt == 4 and found.tokens == len(batch.input_ids)
    assert set(found.lengths) == {"prompt", "chosen", "rejected", "whole"}
    whole = found.lengths["whole"].mean
    assert whole == sum(found.lengths[name].mean for name in ("prompt", "chosen", "rejected"))


def test_solutions_of_other_labels_are_no_duplicates(tmp_path):
    row = {"prompt": "Add 1.", "completions": ["1", "1 + 1"], "labels": [True, False]}
    data = loaded(StepwiseDataModule, tmp_path, [row, row, {**row, "labels": [True, True]}], [row])
    found, _ = overview(data.datasets["train"], data.datasets["train"].reports)
    assert found.repeated == 1 and found.learnt == 6


def test_prompts_have_no_token_in_the_loss(tmp_path):
    rows = [{"prompt": "Hello."}, {"prompt": "Hello."}, {"prompt": "Thanks."}]
    data = loaded(RolloutDataModule, tmp_path, rows, rows[1:], reward=max)
    train, contents = overview(data.prompts["train"], data.reports["train"])
    held, _ = overview(data.prompts["validation"], data.reports["validation"], train=contents)
    assert (train.examples, train.learnt, train.repeated, held.in_train) == (3, None, 1, 2)
    assert train.tokens == sum(map(len, data.prompts["train"].prompt_ids)) and set(train.lengths) == {"prompt"}


@pytest.mark.parametrize("lengths", [[7], [1, 2, 2, 9], list(range(3, 500, 7))])
def test_a_histogram_counts_each_length_in_a_bin_of_whole_tokens(lengths):
    found = Lengths.of(np.array(lengths))
    assert sum(found.counts) == len(lengths) and len(found.counts) <= BINS
    for count, low, high in zip(found.counts, found.edges, found.edges[1:], strict=False):
        assert count == sum(low <= length < high for length in lengths) and low == int(low)
    assert (found.least, found.most) == (min(lengths), max(lengths))
