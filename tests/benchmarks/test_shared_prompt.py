import json

import pytest

from benchmarks import shared_prompt, workload


def test_each_group_is_a_line_of_what_it_costs_beside_one_response(capsys, monkeypatch):
    monkeypatch.setattr(shared_prompt, "GROUPS", (2, 3))
    shared_prompt.main(["--shape", "tiny", "--sizes", "64x4", "8x2", "--repeats", "1"])
    output = capsys.readouterr().out
    lines = [json.loads(line) for line in output.splitlines() if line.startswith('{"network"')]
    cases = [(line["network"], line["prompt"], line["response"], line["group"]) for line in lines]
    sizes = [(64, 4, 2), (64, 4, 3), (8, 2, 2), (8, 2, 3)]
    assert cases == [(network, *size) for network in ("policy", "scorer") for size in sizes]
    assert all(line["seconds_of_one"] > 0 and line["seconds_of_group"] > 0 and line["ratio"] > 0 for line in lines)
    assert "| scorer | 64 | 4 | 3 |" in output


def test_a_group_has_the_prompt_once_and_its_responses_all():
    tiny = workload.SHAPES["tiny"]
    # 20 tokens more for each of 4 responses, that see 61 to 80 keys and, in a policy, go through the head.
    more = 4 * (2 * tiny.linear_parameters() * 20 + 4 * tiny.layers * tiny.hidden * sum(range(61, 81)))
    in_head = 4 * 2 * tiny.hidden * tiny.vocabulary * 20
    for network, expected in (
        ("scorer", more / tiny.forward_flops([80], 0)),
        ("policy", (more + in_head) / tiny.forward_flops([80], 20)),
    ):
        bounds = shared_prompt.bounds(tiny, network, 60, 20, 5)
        assert bounds["tokens"] == 160 / 80
        assert bounds["operations"] - 1 == pytest.approx(expected)
