"""ZeRO-2 on two CPUs, where DeepSpeed is installed (`pip install ".[deepspeed]"`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_rlhf.algorithms.checkpoint import read_facts, read_weights
from lit_rlhf.cli.checkpoints import require_checkpoint
from lit_rlhf.cli.export import export
from tests.stages import write_inputs

ROOT = Path(__file__).parents[2]


def test_stages_under_zero_2_learn_what_they_learn_under_ddp_and_resume_and_export(tmp_path):
    pytest.importorskip("deepspeed", reason="an extra: pip install '.[deepspeed]'")
    write_inputs(tmp_path)
    paths = [str(ROOT), str(ROOT / "envs"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(ROOT / "tests" / "deepspeed_script.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.pop("resumed") == 0
    for run, found in results.items():
        mixed = run.startswith("mixed")  # weights are rounded to bfloat16 in memory, their masters are not
        assert found["apart"] < (0.01 if mixed else 1e-6), (run, found)
        assert found["norms"][0] == pytest.approx(found["norms"][1], rel=0.1 if mixed else 1e-4), run

    checkpoint = tmp_path / "zero" / "sft" / "checkpoints" / "epoch=1.ckpt"
    require_checkpoint(checkpoint, training=True)
    assert read_facts(checkpoint)["algorithm"] == "SFT"
    exported = load_file(tmp_path / "zero" / "sft" / "model" / "model.safetensors")
    stored = read_weights(checkpoint, "policy")
    assert all(torch.equal(stored[name], weight) for name, weight in exported.items())
    export(str(checkpoint), str(tmp_path / "again"))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "zero" / "sft" / "model" / "model.safetensors"
    ).read_bytes()
