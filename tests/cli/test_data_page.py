"""The page of rows: whatever a row holds stays text, and nothing is fetched."""

import json
import re

import pytest

from lit_rlhf.cli.data_page import page
from lit_rlhf.demo import CONFIGS
from tests.cli.command_line import run
from website.browser import Browser, chromium

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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(chromium() is None, reason="no Chromium is at hand")
def test_in_a_browser_each_token_says_what_it_is_and_what_was_cut_is_struck_out(tmp_path, monkeypatch):
    row = {"prompt": "Hello.", "chosen": " Good day!" * 9, "rejected": " <b>No.</b>"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    monkeypatch.chdir(tmp_path)
    given = ["--model.policy=demo", "--data.train=rows.jsonl", "--data.validation=null", "--data.max_length=16"]
    assert run("data", "--config", CONFIGS / "dpo.yaml", *given, "--html=rows.html", "--json=rows.json") == 0
    (shown,) = json.loads((tmp_path / "rows.json").read_text())["roles"]["train"]["rows"]
    browser = Browser(tmp_path / "profile")
    try:
        browser.open((tmp_path / "rows.html").as_uri(), "1 rows read = 0 whole + 1 cut + 0 dropped")
        titles = browser.value("[...document.querySelectorAll('section .token')].map(token => token.title)")
        assert browser.value("document.querySelectorAll('section .cut').length") == len(shown["parts"][1]["left_out"])
        assert browser.value("document.querySelectorAll('section b').length") == 0
    finally:
        browser.close()
    tokens = [token for part in shown["parts"] for name in ("tokens", "left_out") for token in part[name]]
    told = [
        f"id {t['id']}\n{json.dumps(t['text'])}\nrole {t['role']}\nloss {'yes' if t['learnt'] else 'no'}"
        for t in tokens
    ]
    assert [title.removesuffix("\ncut off") for title in titles] == told
