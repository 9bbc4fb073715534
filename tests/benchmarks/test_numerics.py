import json

import pytest
import torch

from benchmarks import numerics, workload
from lit_rlhf.engine import layout


@pytest.fixture(scope="module")
def work():
    return numerics.make_work(workload.SHAPES["tiny"], 2)


def test_each_way_is_a_line_of_how_far_it_is_from_a_packed_pass(capsys):
    numerics.main(["--shape", "tiny", "--pairs", "1"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    logprobs = {line["way"]: line["logprobs_max"] for line in lines if "logprobs_max" in line}
    gradients = {line["way"]: line["gradient"] for line in lines if "gradient" in line}
    assert list(logprobs) == list(numerics.LOGPROBS) and list(gradients) == list(numerics.GRADIENTS)
    assert logprobs["the same once more"] == gradients["the same once more"] == 0
    for found in (logprobs, gradients):
        assert all(0 <= size < (1e-1 if "bfloat16" in way else 1e-4) for way, size in found.items())
        assert found["bfloat16"] > 1e-4
    assert lines[-1]["rows_alike"] == numerics.rows_alike(128, 128)


@torch.no_grad()
def test_the_sampler_reads_each_response_in_its_place(work):
    """Other orders would give other log-probs, not those a rounding away."""
    torch.testing.assert_close(numerics.sample_again(work, 3), numerics.read(work), rtol=0, atol=1e-4)


def test_settings_are_as_before_once_measured(work):
    before = layout.SHARED_GAIN, torch.get_num_threads(), work.policy.model.config._attn_implementation
    for way in ("prompts attended once", "two threads", "transformers' own attention"):
        numerics.LOGPROBS[way](work)
    assert before == (layout.SHARED_GAIN, torch.get_num_threads(), work.policy.model.config._attn_implementation)
