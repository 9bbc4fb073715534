import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from lit_rlhf.data.batches import PreferenceBatch, SFTBatch
from lit_rlhf.data.examples import SFTDataset
from lit_rlhf.data.modules import PreferenceDataModule, SFTDataModule, load_prompts
from lit_rlhf.errors import UserError
from tests.data.small_rows import WORDS, attach, pair_file, sft_file, write
from tests.tiny_tokenizers import word_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"


def test_demonstrations_become_packed_batches_with_masked_targets(tmp_path):
    source = write(tmp_path / "rows.jsonl", [{"prompt": "how so", "completion": " yes"}, {"text": "it is"}])
    module = SFTDataModule(source, None, batch_size=2, shuffle=False, tokenizer=word_tokenizer(WORDS))
    [batch] = attach(module).train_dataloader()
    assert isinstance(batch, SFTBatch)
    # nodes: how " so" " yes" <eos> | it " is" <eos>; learnt: " yes" <eos> | " is" <eos>
    tokens = module.tokenizer.convert_ids_to_tokens
    assert tokens(batch.packed.input_ids.tolist()) == ["how", " so", " yes", "<eos>", "it", " is", "<eos>"]
    assert tokens(batch.packed.target_ids.tolist()) == [" yes", "<eos>", " is", "<eos>"]
    assert batch.packed.predictors.tolist() == [1, 2, 4, 5]
    assert batch.packed.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.denominator.item() == 4


def test_pairs_become_packed_batches_that_store_the_prompt_once(tmp_path):
    module = PreferenceDataModule(pair_file(tmp_path), None, batch_size=20, tokenizer=word_tokenizer(WORDS))
    [batch] = attach(module).train_dataloader()
    assert isinstance(batch, PreferenceBatch)
    assert batch.packed.num_sequences == 40
    assert batch.margin.tolist() == batch.row_ids.tolist(), "row i has margin i"
    assert batch.denominator.item() == 20
    # prompt 2, chosen 1 to 5 and the end token, rejected 1 and the end token
    assert len(batch.packed.input_ids) == 20 * (2 + 3 + 1 + 2)


def test_dropped_and_truncated_rows_are_counted_and_never_dealt(tmp_path):
    rows = [{"prompt": "how", "chosen": " yes" * n, "rejected": " no"} for n in (1, 9, 2)]
    source = write(tmp_path / "pairs.jsonl", [*rows, {"prompt": "how", "chosen": " no", "rejected": " no"}])
    options = {"max_length": 6, "truncation": "drop", "tokenizer": word_tokenizer(WORDS)}
    with pytest.warns(UserWarning, match=r"2 of 4 rows are not used whole.*truncation: truncate"):
        module = attach(PreferenceDataModule(source, None, **options))
    [report] = module.datasets["train"].reports
    assert (report.rows, report.kept) == (4, 2)
    assert report.dropped == {"too long": 1, "ties: chosen equals rejected": 1}
    assert module.num_rows("train") == 2
    [batch] = module.train_dataloader()
    assert sorted(batch.row_ids.tolist()) == [0, 1] and len(batch.packed.input_ids) == (1 + 2 + 2) + (1 + 3 + 2)
    with pytest.warns(UserWarning, match=r"12 of 20 rows .* Raise max_length \(4\).*truncation: drop"):
        cut = attach(SFTDataModule(sft_file(tmp_path), None, max_length=4, tokenizer=word_tokenizer(WORDS)))
    assert cut.datasets["train"].reports[0].truncated == 12, "completions of 3, 4 and 5 words"


def test_an_example_that_no_micro_batch_can_take_is_told_by_file_and_line(tmp_path):
    rows = {"a.jsonl": [" yes", None, " no"], "b.jsonl": [" no", " yes" * 9]}  # None: a tie, which is dropped
    sources = [
        write(tmp_path / name, [{"prompt": "how", "chosen": text or " so", "rejected": " so"} for text in texts])
        for name, texts in rows.items()
    ]
    module = PreferenceDataModule(sources, None, max_tokens=8, tokenizer=word_tokenizer(WORDS))
    with pytest.warns(UserWarning, match="1 of 3 rows"):
        attach(module)
    assert [module.datasets["train"].place(example)[-15:] for example in (1, 2)] == [
        "a.jsonl, line 3",
        "b.jsonl, line 1",
    ]
    with pytest.raises(UserError, match=r"b\.jsonl, line 2: 13 tokens are more than data\.max_tokens \(8\)"):
        module.train_dataloader()


def test_several_sources_are_mixed_by_weight(tmp_path):
    few = write(tmp_path / "few.jsonl", [{"text": "how so"}] * 4)
    many = write(tmp_path / "many.jsonl", [{"text": "it is yes"}] * 10)
    module = attach(SFTDataModule({few: 3.0, many: 0.5}, None, batch_size=1, tokenizer=word_tokenizer(WORDS)))
    lengths = [len(batch.packed.input_ids) for batch in module.train_dataloader()]
    assert sorted(lengths) == [3] * 12 + [4] * 5
    assert len(module.datasets["train"].reports) == 2


def test_a_bad_row_reaches_the_user_as_one_message(tmp_path):
    source = write(tmp_path / "bad.jsonl", [{"text": "how"}, {"txt": "so"}])
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2: expected the columns"):
        attach(SFTDataModule(source, None, tokenizer=word_tokenizer(WORDS)))


@pytest.mark.parametrize("make", [SFTDataModule, PreferenceDataModule])
def test_empty_data_are_an_error_that_says_what_was_expected(tmp_path, make):
    source = write(tmp_path / "empty.jsonl", [])
    with pytest.raises(UserError, match=r"empty\.jsonl: there are no rows; expected `"):
        attach(make(source, None, tokenizer=word_tokenizer(WORDS)))
    with pytest.raises(UserError, match="there are no rows; expected `prompt`"):
        load_prompts(source, "train", word_tokenizer(WORDS))


def test_no_row_left_is_an_error_with_the_reasons(tmp_path):
    with pytest.raises(UserError, match=r"no row is left .* 20 dropped \(20 too long\)"):
        options = {"max_length": 3, "truncation": "drop", "tokenizer": word_tokenizer(WORDS)}
        attach(PreferenceDataModule(pair_file(tmp_path), None, **options))
    source = write(tmp_path / "long.jsonl", [{"prompt": "how so very", "completion": " yes"}] * 4)
    with pytest.raises(UserError, match="4 whose prompt alone reaches max_length: shorten prompts or raise"):
        attach(SFTDataModule(source, None, max_length=3, tokenizer=word_tokenizer(WORDS)))


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data folder with real rows")
def test_real_conversations_keep_most_rows_and_share_their_prompts():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "gpt2")
    template = "{% for m in messages %}{{ '\n\n' + m.role + ': ' + m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '\n\nassistant: ' }}{% endif %}"
    source = str(SHARED / "preference" / "hh_helpful_test.jsonl.gz")
    options = {"max_length": 512, "truncation": "drop", "chat_template": template, "tokenizer": tokenizer}
    with pytest.warns(UserWarning, match=r"111 dropped \(111 too long\)"):
        module = attach(PreferenceDataModule(source, None, **options))
    [report] = module.datasets["train"].reports
    assert report.rows == 1000 and report.kept > 850 and set(report.dropped) == {"too long"}
    batch = next(iter(module.train_dataloader()))
    lengths = [len(nodes) for nodes in batch.packed.layout.buckets]
    assert lengths and len(batch.packed.input_ids) <= 4096
    table = module.datasets["train"].table.with_format(None)
    rows = [row for row in table.select(range(50)) if row["chosen_ids"]]
    assert all(row["chosen_ids"][-1] == row["rejected_ids"][-1] == tokenizer.eos_token_id for row in rows)
    assert all(tokenizer.decode(row["prompt_ids"]).endswith("assistant:") for row in rows), "the space joins the answer"


def large_table(num_rows: int, tokens: int) -> SFTDataset:
    """Rows of so many tokens, in several chunks."""
    ids = np.arange(num_rows * tokens, dtype=np.int32) % 100
    ends = np.arange(0, num_rows * tokens + 1, tokens, dtype=np.int32)
    lists = {
        "input_ids": pa.ListArray.from_arrays(ends, ids),
        "loss_mask": pa.ListArray.from_arrays(ends, ids % 3 == 0),
    }
    table = pa.table(lists | {"status": np.zeros(num_rows, np.int8)})
    chunks = [table.slice(0, 3), table.slice(3, num_rows // 2), table.slice(3 + num_rows // 2)]
    return SFTDataset(datasets.Dataset(pa.concat_tables(chunks)), np.arange(num_rows)[::2], [])


def test_counts_and_fingerprint_of_rows_do_not_depend_on_how_they_lie_in_chunks():
    several = large_table(2500, 7)
    whole = SFTDataset(datasets.Dataset(several.table.data.table.combine_chunks()), several.rows, [])
    expected = [sum(mask) for mask in several.table.data.column("loss_mask").to_pylist()][::2]
    assert several.items().tolist() == whole.items().tolist() == expected
    assert several.fingerprint() == whole.fingerprint()
    other = SFTDataset(datasets.Dataset(whole.table.data.table), several.rows[::-1].copy(), [])
    assert other.fingerprint() != whole.fingerprint()


def test_what_is_counted_of_rows_takes_less_memory_than_a_byte_for_each_of_their_tokens():
    dataset = large_table(20_000, 200)
    tracemalloc.start()
    dataset.items()
    dataset.fingerprint()
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < 20_000 * 200


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_rows_that_repeat_an_earlier_one_of_any_source_are_left_out_if_asked_for(weight, tmp_path):
    row, other = {"prompt": "how", "completion": " yes"}, {"prompt": "how", "completion": " no"}
    first = write(tmp_path / "a.jsonl", [row, other, row])
    second = write(tmp_path / "b.jsonl", [other, {"prompt": "so", "completion": " yes"}, {"text": "how yes"}])
    train = [{"source": first, "weight": weight}, second]
    how = {"validation": first, "tokenizer": word_tokenizer(WORDS)}
    module = attach(SFTDataModule(train, deduplicate=True, **how))  # no warning: that rows are left out was asked for
    dataset = module.datasets["train"]
    # The text is learnt as the first row is: nothing predicts its first token.
    assert [report.dropped for report in dataset.reports] == [{"the same as an earlier row": n} for n in (1, 2)]
    assert dataset.rows.tolist() == [0, 1] * int(weight) + [4]
    assert len(module.datasets["validation"]) == 3
    assert len(attach(SFTDataModule(train, **how)).datasets["train"]) == 3 * weight + 3
