"""What ends one rank of a run ends them all, is told once, and gives the run its status."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from lit_rlhf.cli import ranks
from lit_rlhf.cli.ranks import Ranks, tell
from lit_rlhf.signals import SIGNALS
from tests.stages import write_inputs

LOST = RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.1.1]:34223")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(ranks, "SECONDS_BEHIND", 0.3)
    monkeypatch.setattr(ranks, "SECONDS_TO_END", 5.0)
    monkeypatch.setenv(ranks.STARTED_BY, "0")  # and as it was before, afterwards


@pytest.fixture
def ranks_of():
    """The ranks of a run whose children are some programs."""
    made = []
    yield lambda *programs: made.append(start(programs)) or made[-1]
    for watching in made:
        watching.end()


def start(programs):
    children = [subprocess.Popen([sys.executable, "-c", program]) for program in programs]
    launcher = SimpleNamespace(procs=children)
    observed = launcher.procs
    watching = Ranks(SimpleNamespace(world_size=1 + len(programs), strategy=SimpleNamespace(launcher=launcher)))
    while not watching.children:
        time.sleep(0.01)
    assert observed == [], "Lightning's observer sees no child fail, and so does not kill this process"
    return watching


def test_a_rank_that_lost_another_follows_it_and_lets_it_have_the_word(ranks_of, capsys):
    watching = ranks_of("import time; time.sleep(0.5); raise SystemExit(2)")
    assert watching.lost(LOST) and watching.follow(LOST) == 2
    assert capsys.readouterr().err == ""


def test_a_rank_that_could_not_say_what_ended_it_is_spoken_for(ranks_of, capsys):
    watching = ranks_of("import os; os.kill(os.getpid(), 9)")
    assert watching.follow(LOST) == 137
    assert capsys.readouterr().err == "error: rank 1 was ended by SIGKILL; is the memory full?\n"


def test_a_rank_that_torchrun_ends_because_of_another_says_nothing(capsys):
    alone = Ranks(SimpleNamespace(world_size=2, strategy=SimpleNamespace(launcher=None)))
    with SIGNALS.listening(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
        assert alone.follow(LOST) == 143
    assert capsys.readouterr().err == ""


def test_a_rank_that_nobody_ends_says_what_it_knows(capsys, monkeypatch):
    monkeypatch.setattr(ranks, "SECONDS_TO_END", 0.0)
    alone = Ranks(SimpleNamespace(world_size=2, strategy=SimpleNamespace(launcher=None)))
    assert alone.follow(LOST) == 1
    assert "is without a connection to another rank, which has ended: [/gloo/" in capsys.readouterr().err


@pytest.mark.parametrize(
    "said",
    [
        "Timed out after 11 seconds waiting for clients. 1/2 clients joined.",
        "The client socket has timed out after 10000ms while trying to connect to (127.0.0.1, 29555).",
    ],
)
def test_ranks_that_never_met_name_the_address_and_the_option_that_bounds_it(said, capsys, monkeypatch):
    monkeypatch.setattr(ranks, "SECONDS_TO_END", 0.0)
    monkeypatch.setenv("MASTER_ADDR", "there")
    monkeypatch.setenv("MASTER_PORT", "29555")
    error, strategy = RuntimeError(said), SimpleNamespace(launcher=None, _timeout=timedelta(minutes=30))
    watching = Ranks(SimpleNamespace(world_size=2, strategy=strategy))
    assert watching.lost(error) and watching.follow(error) == 1
    assert (
        "not met the other ranks at there:29555 within 0:30:00 (timeout of trainer.strategy)" in capsys.readouterr().err
    )


def test_a_rank_that_waits_for_others_to_start_says_so(monkeypatch, capfd):
    monkeypatch.setattr(ranks, "SECONDS_TO_MEET", 0.0)
    strategy = SimpleNamespace(launcher=SimpleNamespace(procs=[]), _timeout=timedelta(minutes=30))
    watching, told = Ranks(SimpleNamespace(world_size=2, strategy=strategy)), ""
    while "\n" not in told:
        time.sleep(0.01)
        told += capfd.readouterr().err
    watching.end()
    assert (
        told
        == "rank 0 waits for the other ranks to be there; it does for 0:30:00 at most (timeout of trainer.strategy)\n"
    )


ORPHAN = """
import time
from types import SimpleNamespace
from lit_rlhf.cli.ranks import Ranks
Ranks(SimpleNamespace(world_size=2, strategy=SimpleNamespace(launcher=SimpleNamespace(procs=[]))))
time.sleep(60)
"""


def test_a_rank_ends_with_the_one_that_started_it():
    environment = os.environ | {"LOCAL_RANK": "1", ranks.STARTED_BY: "1"}  # a process that is not its parent any more
    orphan = subprocess.run(
        [sys.executable, "-c", ORPHAN], env=environment, capture_output=True, text=True, timeout=120
    )
    assert "has lost rank 0, which was killed; is the memory full?" in orphan.stderr and orphan.returncode == 1


def test_a_mistake_of_our_own_is_no_lost_connection():
    several = Ranks(SimpleNamespace(world_size=2, strategy=SimpleNamespace(launcher=None)))
    alone = Ranks(SimpleNamespace(world_size=1, strategy=SimpleNamespace(launcher=None)))
    chained = ValueError("while saving")
    chained.__cause__ = LOST
    assert several.lost(chained) and not alone.lost(LOST)
    assert not several.lost(RuntimeError("shape mismatch")) and not several.lost(ValueError("Connection closed"))


def test_no_child_is_left_behind(ranks_of):
    watching = ranks_of("import time; time.sleep(60)", "import signal, time; signal.signal(15, print); time.sleep(60)")
    time.sleep(0.5)  # for the second to be deaf
    watching.end()
    assert [child.wait() for child in watching.children] == [-15, -9]


@pytest.mark.parametrize(("rank", "ended"), [(0, False), (1, False), (1, True)])
def test_what_ends_every_rank_is_told_by_the_first_and_to_torchrun(rank, ended, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ranks, "rank", lambda: rank)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    if ended:  # by the first rank's end
        monkeypatch.setattr(time, "sleep", lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
    with SIGNALS.listening():
        tell("error: no data")
    assert capsys.readouterr().err == ("" if ended else "error: no data\n")
    if not ended:
        told = json.loads((tmp_path / "error.json").read_text())["message"]
        assert told["message"] == told["extraInfo"]["py_callstack"] == "error: no data"


REWARD = """
import os

def fails_on_rank_1(prompts, responses, **columns):
    return None if os.environ.get("LOCAL_RANK") == "1" else [0.0] * len(responses)
"""


def test_a_reward_that_fails_on_one_rank_ends_a_run_on_two_with_one_line(tmp_path):
    write_inputs(tmp_path)
    (tmp_path / "my_rewards.py").write_text(REWARD)
    options = {
        "model": "lit_rlhf.PPO",
        "model.policy": "model",
        "model.num_minibatches": 2,
        "data": "lit_rlhf.RolloutDataModule",
        "data.train": "prompts.jsonl",
        "data.validation": "null",
        "data.reward": "lit_rlhf.TextReward",
        "data.reward.function": "my_rewards.fails_on_rank_1",
        "data.rollout_size": 8,
        "data.num_slots": 4,
        "data.max_new_tokens": 4,
        "trainer.accelerator": "cpu",
        "trainer.devices": 2,
        "trainer.max_epochs": 1,
        "trainer.logger": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.default_root_dir": "run",
    }
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{root}/envs"}
    command = [sys.executable, "-m", "lit_rlhf", "fit", *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert line.startswith("error: ") and "my_rewards.fails_on_rank_1" in line
