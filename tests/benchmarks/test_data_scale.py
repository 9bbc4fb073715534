import json

import numpy as np
import pytest

from benchmarks import data_scale


@pytest.mark.parametrize("kind", ["preference", "prompts"])
def test_each_size_is_a_line_and_the_exponents_are_the_last(kind, capsys):
    data_scale.main(["--kind", kind, "--rows", "20", "40", "--words", "4"])
    *lines, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["rows"] for line in lines] == [20, 40]
    measured = set(data_scale.MEASURED) - ({"begin", "plan", "fingerprint", "batch"} if kind == "prompts" else set())
    assert all(measured <= set(line) and line["tokens"] > 0 for line in lines)
    assert set(last["exponents"]) == measured


def test_an_exponent_is_that_of_a_power():
    sizes = [10, 100, 1000]
    assert data_scale.exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert data_scale.exponent(sizes, [2.0, 2.0, 2.0]) == pytest.approx(0, abs=1e-12)


def test_memory_is_what_was_held_within_though_it_is_gone_again():
    with data_scale.own_memory() as most:
        held = np.ones(2**24)  # 128 MB
        del held
        assert 100 < most() < 200


def test_a_size_that_fails_is_told_with_what_it_said(monkeypatch):
    monkeypatch.setattr(data_scale, "write_rows", lambda file, *rest: file.write_text("{"))
    with pytest.raises(SystemExit, match=r"(?s)20 rows: .*rows.jsonl"):
        data_scale.main(["--rows", "20"])
