"""The page of tokens: whatever a text holds stays text, in any script."""

import json
import re

from lit_rlhf.callbacks.token_page import token_page

EVIL = "</script><script>alert(1)</script><!--<b>&amp; \" ' \\ \u2028 🙂 Grüße 你好 \ud83d %s"


def validation(step=0, text=EVIL, reading=0.5):
    row = {"prompt": text, "completion": text, "score": 0.5, "finish_reason": "stop"}
    return {"step": step, "samples": [{"row": row, "pieces": [text], "readings": {"KL": [reading]}}]}


def data_of(page):
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    return data


def test_no_text_of_a_model_becomes_markup_or_script():
    page, harmless = token_page([validation()]), token_page([validation(text="harmless")])
    assert page.count("<script") == harmless.count("<script") == 2
    assert page.count("</script") == harmless.count("</script") == 2
    assert "<" not in data_of(page) and "alert(1)" in data_of(page)
    assert "innerHTML" not in page and "document.write" not in page


def test_text_of_any_script_comes_back_as_it_was_but_for_halves_of_characters():
    read = json.loads(data_of(token_page([validation()])))
    assert read[0]["samples"][0]["row"]["prompt"] == EVIL.replace("\ud83d", "?")


def test_it_holds_each_validation_and_numbers_that_are_none_are_null():
    read = json.loads(data_of(token_page([validation(0), validation(40, reading=float("nan"))])))
    assert [one["step"] for one in read] == [0, 40]
    assert read[1]["samples"][0]["readings"]["KL"] == [None]


def test_it_needs_nothing_from_elsewhere():
    assert not re.search(r"(src|href)\s*=|@import|url\(|fetch\(|https?://", token_page([validation(text="a")]))
