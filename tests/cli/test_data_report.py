import pytest

from lit_rlhf.cli.data import Looked
from lit_rlhf.cli.data_report import HEAD, LEGEND, MOST, bars, fates, lines_of, print_report, written
from lit_rlhf.data.overview import Fates, Lengths, Overview
from lit_rlhf.data.viewing import Part, ShownRow, Token

SOURCE = Fates("rows.jsonl", 1010, 990, 8, {"too long": 10, "ties": 2}, 5, 3, 4, {"<|end|>": 6})
LENGTHS = Lengths(1, 2.0, 2.5, 9.0, 10, [1.0, 6.0, 11.0], [8, 2])
FIGURES = Overview([SOURCE], 993, 4000, 1000, {"prompt": LENGTHS}, 7, 2, 5)


def token(text, role="user", learnt=False, control=False):
    return Token(1, text, role, learnt, control)


def test_the_parts_of_a_source_make_its_whole_and_each_is_named():
    first, *rest = fates(SOURCE)
    assert first == "rows.jsonl: 1,010 rows read = 990 whole + 8 cut + 12 dropped"
    told = " ".join(rest)
    for said in (
        "10 dropped: too long",
        "2 dropped: ties",
        "5 that could be used are not taken",
        "3 of the whole ones",
    ):
        assert said in told
    assert "4 whose response begins" in told and "6 spell out the control token <|end|>" in told


def test_an_epoch_is_told_with_its_share_of_the_loss_and_how_full_its_batches_are():
    told = " ".join(lines_of(FIGURES, 5, 1000))
    assert "1,000 of them in the loss (25.0%), 5 micro-batches of up to 1,000 tokens (80% full)" in told
    assert "7 rows are the same" in told and "2 rows are in the training data, too; 5 have" in told


def test_bars_are_as_high_as_their_counts_and_one_row_is_seen():
    assert bars([0, 1, 500, 1000]) == " ▁▄█"


def test_a_long_run_is_written_in_part_and_line_breaks_and_control_tokens_are_seen():
    assert written([token("<|user|>", control=True), token("a\n"), token("b")]) == "‹<|user|>›a⏎\nb"
    run = [token(f"{i} ") for i in range(MOST + 50)]
    text = written(run)
    assert text.startswith("0 1 ") and "… 50 tokens …" in text and text.endswith(f"{MOST + 49} ")
    assert f"{HEAD - 1} " in text and f" {HEAD} " not in text


@pytest.mark.parametrize("learnt", [True, False])
def test_a_row_shows_who_speaks_what_is_learnt_and_where_it_was_cut(learnt, capsys):
    tokens = [token("<|user|>", control=True), token("Hi [bold]"), token("Yes", "assistant", learnt)]
    part = Part("row", tokens, [token(" gone", "assistant")], 3)
    rows = [ShownRow("rows.jsonl, line 1", "truncated", [part], "{}"), ShownRow("line 2", "ties", [], '{"a": 1}')]
    head = {"data": "SFTDataModule", "model": "SFT", "tokenizer": "demo", "max_length": 3, "max_tokens": 8}
    print_report(head, {"train": Looked(FIGURES, 5, rows)})
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    assert ["user", "‹<|user|>›Hi", "[bold]"] in lines
    assert (["assistant", "*", "Yes"] if learnt else ["assistant", "Yes"]) in lines
    assert ["✂", "1", "tokens", "are", "cut", "off:"] in lines and ["assistant", "✂", "gone"] in lines
    assert LEGEND in said and "line 2: ties" in said and '{"a": 1}' in said
    assert max(map(len, said.splitlines())) <= 80
