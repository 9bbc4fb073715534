"""Talking to a model on the command line."""

import io
import os
import pty
import shutil
import signal
import sys
import threading

import pytest
from rich.console import Console

from lit_rlhf import RewardModel
from lit_rlhf.callbacks.export import export
from lit_rlhf.cli.chat import COMMANDS, Columns
from lit_rlhf.models.loading import load_policy_with_tokenizer
from lit_rlhf.rollout.conversation import Conversation
from lit_rlhf.rollout.play import GenerationSettings
from tests.cli.command_line import run
from tests.tiny import save_tiny, tiny_tokenizer

SHORT = "--generation.max_new_tokens=6"
TEMPLATE = "{% for m in messages %}{% if m.role == 'system' %}w5 {% endif %}{{ m.content + ' ' }}{% endfor %}"


def brief(prompts, responses):
    return [-float(len(response.split())) for response in responses]


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A model whose tokenizer has a chat template."""
    folder = save_tiny(tmp_path_factory.mktemp("chatty") / "model", seed=1)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def say(monkeypatch, capsys):
    """Chat with lines from a pipe; returns the exit status, and what was printed."""

    def say(lines, *args):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        status = run("chat", *args, SHORT)
        return status, *capsys.readouterr()

    return say


def answers(folder, questions, system=None):
    """What a model answers, by the conversation in Python."""
    policy, tokenizer = load_policy_with_tokenizer(folder)
    talk = Conversation(policy.eval(), tokenizer, GenerationSettings(max_new_tokens=6), system)
    return [talk.ask(question).text.strip() for question in questions]


def test_lines_of_a_pipe_are_answered_by_lines_alone(chatty, say):
    status, out, _ = say(["w10 w11", "", "w12"], chatty)
    assert status == 0
    assert out.splitlines() == answers(chatty, ["w10 w11", "w12"])


def test_a_base_model_continues_each_line(folder, say):
    assert say(["w10", "w10 w11"], "--model", folder)[1].splitlines() == answers(folder, ["w10", "w10 w11"])


def test_two_models_answer_each_in_its_own_words_with_what_a_reward_gives(chatty, folder, say):
    args = [f"--model={chatty}", f"--against={folder}", f"--reward={__name__}.brief"]
    lines = say(["w10", "w11"], *args)[1].splitlines()
    mine, theirs = answers(chatty, ["w10", "w11"]), answers(folder, ["w10", "w11"])
    expected = []
    for pair in zip(mine, theirs, strict=True):
        for name, text in zip((chatty, folder), pair, strict=True):
            expected += [f"{name}:", text, f"reward: {-len(text.split()):.4f}"]
    assert lines == expected


def test_a_reward_model_scores_the_answers(chatty, folder, say, tmp_path):
    module = RewardModel(str(folder))
    export(module, module.exported_weights(), tmp_path / "model")
    _, out, _ = say(["w10"], chatty, f"--reward={tmp_path / 'model'}")
    assert float(out.splitlines()[-1].removeprefix("reward: ")) != 0


def test_commands_forget_set_a_system_prompt_and_ask_again(chatty, say):
    lines = ["w10", "/reset", "w10", "/system w30", "w11", "/system", "w11", "/retry", "/help", "/exit", "w12"]
    status, out, _ = say(lines, chatty, "--generation.temperature=0")
    answered, told = out.splitlines()[:5], out.splitlines()[5:]
    assert status == 0
    assert answered[0] == answered[1]
    assert answered[2] != answered[3] == answered[4]
    assert [line.split()[0] for line in told] == [*COMMANDS]


def test_a_system_prompt_is_read_and_refused_where_it_would_not_be(chatty, folder, say):
    assert say(["w10"], chatty, "--system=w30")[1].splitlines() == answers(chatty, ["w10"], "w30")
    status, _, told = say(["w10"], folder, "--system=w30")
    assert status == 2 and told.splitlines()[-1].startswith("error: ") and "no chat template" in told


@pytest.mark.parametrize(
    ("args", "lines", "said"),
    [
        (["--model=nowhere/there"], [], "nowhere/there"),
        (["--reward=no_such.thing"], [], "reward: no_such.thing is neither a folder nor the import path"),
        ([f"--reward={__name__}.nope"], [], "nope"),
        ([], ["/rest"], "there is no command /rest; did you mean /reset?"),
        ([], ["/retry"], "/retry: nothing was asked yet"),
        ([], ["w10 " * 100], "the question has 100 tokens"),
        (["--generation.temperature=-1"], ["w10"], "temperature"),
        (["--temperature=1"], ["w10"], "generation.temperature"),
    ],
)
def test_mistakes_are_told_in_a_line(args, lines, said, chatty, say):
    status, _, told = say(lines, f"--model={chatty}", *args)
    assert status == 2
    (line,) = [line for line in told.splitlines() if line.startswith("error:")]
    assert said in line


def test_a_name_longer_than_a_terminal_stays_one_line_in_a_pipe(folder, say, tmp_path):
    long = shutil.copytree(folder, tmp_path / ("m" * 100))
    assert say(["w10"], long, f"--against={folder}")[1].splitlines()[0] == f"{long}:"


def test_questions_that_are_no_text_are_told_in_a_line(chatty, monkeypatch, capsys):
    for errors in ("strict", "surrogateescape"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8", errors=errors))
        assert run("chat", chatty, SHORT) == 2
        assert "error: standard input is not UTF-8" in capsys.readouterr().err


def test_a_pipe_that_nobody_reads_on_ends_the_chat(chatty, monkeypatch):
    reads, writes = os.pipe()
    with os.fdopen(writes, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stdin", io.StringIO("w10\nw11\n"))
        os.close(reads)
        assert run("chat", chatty, SHORT) == 0


@pytest.fixture
def terminal(monkeypatch):
    """A terminal to type into; calls back with each thing that is read from it before it is answered."""
    mine, theirs = pty.openpty()
    with os.fdopen(theirs, "r") as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        monkeypatch.setattr("builtins.input", lambda prompt: stream.readline().rstrip("\n") or end())
        yield lambda keys: os.write(mine, keys)
    os.close(mine)


def end():
    raise EOFError


def test_a_terminal_goes_on_after_a_mistake_until_ctrl_d(chatty, terminal, capsys):
    terminal(b"/nothing\nw10\n\x04")
    assert run("chat", chatty, SHORT) == 0
    out = capsys.readouterr().out
    assert "error: there is no command /nothing" in out and answers(chatty, ["w10"])[0] in out
    assert f"{chatty}: /help" in out.replace("\n", "")


def test_ctrl_c_ends_an_answer_and_the_chat_goes_on(chatty, terminal, capsys, monkeypatch):
    asked = Conversation.ask

    def interrupted(talk, text, write=None):
        if text == "w11":
            signal.raise_signal(signal.SIGINT)
        return asked(talk, text, write)

    monkeypatch.setattr(Conversation, "ask", interrupted)
    terminal(b"w11\nw10\n\x04")
    assert run("chat", chatty, SHORT) == 0
    out = capsys.readouterr().out
    assert "(stopped; the question is forgotten)" in out and answers(chatty, ["w10"])[0] in out


def test_ctrl_c_at_the_prompt_ends_the_chat_without_a_traceback(chatty, terminal, capsys):
    timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))

    def wait(prompt):
        timer.start()
        timer.join()
        return ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.input", wait)
        assert run("chat", chatty, SHORT) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "the chat has ended"


def test_answers_stand_side_by_side_on_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=40)
    screen = Columns(["one", "two"], console)
    with screen:
        for number, score in enumerate([0.5, -0.25]):
            screen.turn_to(number)
            screen.write(f"said [b]{number}")
            screen.finish(score)
    last = console.file.getvalue().rsplit("┏", 1)[1]
    rows = [line for line in last.splitlines() if "│" in line]
    assert any("said [b]0" in row and "said [b]1" in row for row in rows)
    assert any("reward: 0.5000" in row and "reward: -0.2500" in row for row in rows)
