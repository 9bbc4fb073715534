import json

import pytest

from benchmarks import startup


def test_each_case_is_a_line_of_how_long_its_processes_took(capsys):
    startup.main(["--runs", "2", "--cases", "version", "import lit_rlhf"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["case"] for line in lines] == ["version", "import lit_rlhf"]
    assert all(0 < line["least"] <= line["seconds"] <= line["most"] for line in lines)


@pytest.mark.slow
def test_a_run_is_timed_to_its_first_step_and_ends_there(monkeypatch, tmp_path):
    taken = startup.seconds("fit to the first step", str(tmp_path))
    assert 0 < taken < 120


def test_a_process_that_fails_is_told_with_what_it_said(monkeypatch):
    monkeypatch.setitem(startup.CASES, "fails", ["-c", "raise SystemExit('no')"])
    with pytest.raises(SystemExit, match="fails: no"):
        startup.seconds("fails", "")
