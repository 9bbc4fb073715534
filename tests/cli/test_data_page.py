"""The page of rows: whatever a row holds stays text, and nothing is fetched."""

import json
import re

from lit_rlhf.cli.data_page import page

EVIL = "</script><script>alert(1)</script>"


def found(text):
    token = {"id": 3, "text": text, "role": "user", "learnt": False, "control": False}
    part = {"name": "row", "tokens": [token], "left_out": [token], "cut_at": 1}
    return {"data": text, "roles": {"train": {"rows": [{"place": text, "parts": [part], "text": text}]}}}


def test_no_row_becomes_markup_or_script_and_each_comes_back_as_it_was():
    evil, harmless = page(found(EVIL)), page(found("harmless"))
    assert evil.count("<script") == harmless.count("<script") and "innerHTML" not in evil
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', evil, re.S)
    assert json.loads(data) == found(EVIL)


def test_it_needs_nothing_from_elsewhere():
    assert not re.search(r"(src|href)\s*=|@import|url\(|fetch\(|https?://", page(found("a")))
