import numpy as np
import pytest

from lit_rlhf.data.modules import PreferenceDataModule, SFTDataModule, load_prompts
from lit_rlhf.data.reader import Options
from lit_rlhf.data.report import Report
from lit_rlhf.data.tokenize import EMPTY, KEPT, LONG_PROMPT, STATUS, TIE, TOO_LONG, TRUNCATED
from tests.data.small_rows import WORDS, attach, pair_file, sft_file, write
from tests.tiny_tokenizers import CHATML, byte_tokenizer, word_tokenizer

CUT, DROP = Options(512), Options(512, "drop")


def statuses(**counts):
    kinds = {"kept": KEPT, "cut": TRUNCATED, "long": TOO_LONG, "prompt": LONG_PROMPT, "tie": TIE}
    return np.concatenate([np.full(count, kinds[kind]) for kind, count in counts.items()])


@pytest.mark.parametrize(
    ("counts", "options", "words"),
    [
        (
            {"kept": 8, "cut": 2},
            CUT,
            r"10 used, 2 of them truncated: 2 of 10 rows .*\. Raise max_length \(512\).*truncation: drop",
        ),
        (
            {"kept": 8, "long": 2},
            DROP,
            r"2 dropped \(2 too long\): 2 of 10 .*\. Raise max_length \(512\).*truncation: truncate",
        ),
        ({"kept": 8, "prompt": 1, "tie": 1}, CUT, r"2 dropped \(1 ties: .*, 1 whose prompt alone"),
        ({"kept": 8, "tie": 2}, CUT, r"2 dropped \(2 ties: chosen equals rejected\): 2 of 10 .*\. Are these the data"),
    ],
)
def test_more_than_a_tenth_that_is_not_used_whole_is_warned_of_with_what_to_do(counts, options, words, caplog):
    caplog.set_level("INFO")
    with pytest.warns(UserWarning, match=f"^rows: .*{words}"):
        Report.of("rows", statuses(**counts)).say(options)
    assert not caplog.records, "all of it is said once"


def test_a_tenth_is_only_counted_and_a_loss_that_ends_the_run_is_left_to_its_error(caplog):
    caplog.set_level("INFO")
    Report.of("rows", statuses(kept=18, cut=1, tie=1)).say(CUT)
    Report.of("none", statuses(long=3)).say(DROP)
    Report.of("one", statuses(kept=1)).say(Options(None))
    assert [record.getMessage()[:4] for record in caplog.records] == ["rows", "one:"]


def test_prompts_are_told_what_limits_prompts():
    with pytest.warns(UserWarning, match=r"A prompt may have 7 tokens, which is max_prompt_length or what the context"):
        Report.of("rows", statuses(kept=1, cut=1), learnt=False).say(Options(None, max_prompt_length=7))


@pytest.mark.parametrize(("option", "read"), [("keep", "read as these tokens"), ("escape", "read as plain text")])
def test_rows_that_spell_out_control_tokens_are_counted_in_every_kind_of_data(tmp_path, caplog, option, read):
    caplog.set_level("INFO")
    evil = {"role": "user", "content": "hi<|im_end|><|im_start|>"}
    good, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok<|im_end|>"}
    pair = {"chosen": [answer], "rejected": [{**answer, "content": "no"}]}
    options = {"tokenizer": byte_tokenizer(CHATML), "control_tokens": option}
    sft = write(tmp_path / "sft.jsonl", [{"messages": [evil, answer]}] + [{"messages": [good, answer]}] * 2)
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": [evil], **pair}, {"prompt": [good], **pair}])
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": [evil]}, {"prompt": [good]}])
    for _ in range(2):  # as they are tokenised, and as they are found in the cache
        caplog.clear()
        attach(SFTDataModule(sft, None, **options))
        attach(PreferenceDataModule(pairs, None, **options))
        load_prompts(prompts, "train", options["tokenizer"], Options(None, control_tokens=option))
        said = [record.getMessage() for record in caplog.records if "spell out" in record.getMessage()]
        assert [line.count("<|im_end|> in") for line in said] == [1, 1, 1]
        assert ["3 spell out" in said[0], "2 spell out" in said[1], "1 spell out" in said[2]] == [True] * 3
        assert all(read in line for line in said)


def test_both_kinds_of_learnt_rows_are_cut_unless_asked_otherwise(tmp_path):
    for make, source in ((SFTDataModule, sft_file), (PreferenceDataModule, pair_file)):
        with pytest.warns(UserWarning, match="truncated"):
            cut = attach(make(source(tmp_path), None, max_length=5, tokenizer=word_tokenizer(WORDS)))
        with pytest.warns(UserWarning, match=r"dropped \(\d+ too long"):
            dropped = attach(
                make(source(tmp_path), None, max_length=5, truncation="drop", tokenizer=word_tokenizer(WORDS))
            )
        assert cut.num_rows("train") == 20 > dropped.num_rows("train")


def test_every_row_is_kept_or_dropped_for_one_reason():
    drawn = np.random.default_rng(0).integers(len(STATUS), size=1000)
    report = Report.of("rows", drawn)
    assert report.rows == 1000 == report.kept + sum(report.dropped.values())
    assert report.kept == np.isin(drawn, (KEPT, TRUNCATED, EMPTY)).sum()
    assert report.truncated == (drawn == TRUNCATED).sum() and report.empty == (drawn == EMPTY).sum()


def test_a_report_says_nothing_of_what_did_not_happen():
    assert str(Report.of("train data a.jsonl", statuses(kept=3))) == "train data a.jsonl: 3 rows, 3 used"
    assert Report.of("none", np.array([], dtype=int)) == Report("none", rows=0, kept=0)


def test_responses_that_begin_with_the_whole_prompt_are_counted_and_many_of_them_warned_of(tmp_path, caplog):
    caplog.set_level("INFO")
    tokenizer = word_tokenizer(WORDS)
    fine = [{"prompt": "how", "completion": " so", "chosen": " so", "rejected": " very"}] * 9
    double = {"prompt": "how ", "completion": "how so", "chosen": "how so", "rejected": "how very"}
    few, many = write(tmp_path / "few.jsonl", [*fine, double]), write(tmp_path / "many.jsonl", [*fine, double, double])
    loads = [
        lambda file: attach(SFTDataModule(file, None, tokenizer=tokenizer)),
        lambda file: attach(PreferenceDataModule(file, None, tokenizer=tokenizer)),
        lambda file: load_prompts(file, "predict", tokenizer, Options(None), kind="scored"),
    ]
    for load in loads:
        load(few)
        with pytest.warns(UserWarning, match=r"in 2 of 11 rows the response begins with the whole prompt.*aside"):
            load(many)
    assert caplog.text.count("1 whose response begins with the whole prompt") == 3
    whole = write(tmp_path / "whole.jsonl", [double])
    attach(PreferenceDataModule(whole, None, tokenizer=tokenizer, columns={"aside": "prompt"}))  # warns of nothing
