"""`lit-rlhf chat`: talk to a model, or to two of them side by side, and see what a reward gives for the answers."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lit_rlhf.cli.commands import did_you_mean
from lit_rlhf.errors import UserError, require_types
from lit_rlhf.models.holding import FrozenDtype
from lit_rlhf.models.loading import load_policy_with_tokenizer
from lit_rlhf.models.policy import freeze
from lit_rlhf.rollout.conversation import Conversation
from lit_rlhf.rollout.judges import judge_of
from lit_rlhf.rollout.play import GenerationSettings
from lit_rlhf.rollout.rewards import Reward
from lit_rlhf.signals import Stop

COMMANDS = {
    "/reset": "forget what was said",
    "/system": "forget what was said, and set a system prompt, which stands behind the command; none = without one",
    "/retry": "answer the last question anew",
    "/help": "show this",
    "/exit": "end the chat, as Ctrl-D does; Ctrl-C ends an answer, and else the chat",
}
HELP = "\n".join(f"{name:<9}{said}" for name, said in COMMANDS.items())


def chat(
    model: str,
    against: str | None = None,
    reward: Reward | Callable[..., Any] | str | None = None,
    system: str | None = None,
    generation: GenerationSettings = GenerationSettings(max_new_tokens=256),
    frozen_dtype: FrozenDtype | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Talk to a model: each line is a question, or of a model without a chat template a text that it continues.

    Lines of a pipe or a file are answered one after the other, as if they were typed, and their answers printed alone.

    Args:
        model: folder or hub name of a causal LM, or of an adapter.
        against: another one, which answers beside it.
        reward: what gives a score for each answer: the folder of a reward model, or a function (prompts, responses) of
            text by its import path.
        system: stands before all that is said.
        generation: how answers are written; one ends where the context does, and of a long conversation the earliest
            turns are forgotten.
        frozen_dtype: what weights are held in: float32, bfloat16, or nf4 (4 bits, by bitsandbytes); null = float32.
        trust_remote_code: run code that comes with the models.

    Raises:
        UserError: no such model, one that takes no system prompt, or a reward that cannot score its answers.
    """
    names = [model] if against is None else [model, against]
    require_types(chat, {"model": model, "against": against, "system": system, "generation": generation})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    talks = []
    for name in names:
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "frozen_dtype": frozen_dtype}
        policy, tokenizer = load_policy_with_tokenizer(name, learns=False, **options)
        talks.append(Conversation(freeze(policy).to(device), tokenizer, generation, system))
    judge = None if reward is None else judge_of(reward, "reward")
    if judge is not None:
        judge.check_columns(["prompt"])
        for talk in talks:
            judge.bind(talk.tokenizer, device)
    typed = sys.stdin.isatty()
    console = Console(highlight=False)
    beside = len(talks) > 1 and console.is_terminal
    screen = Columns(names, console) if beside else Lines(names, console)
    if typed:
        tell(console, f"{', '.join(names)}: /help for commands, /exit to end", "dim")
    try:
        for line in typed_lines() if typed else piped_lines():
            with ctrl_c_ends_the_answer() if typed else nullcontext():
                try:
                    respond(line, talks, judge, screen)
                except UserError as error:
                    if not typed:
                        raise
                    tell(console, f"error: {error}", "red")
    except EOFError:  # of /exit
        return
    except BrokenPipeError:  # nobody reads on, as behind `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor what is flushed at the end
    except Stop as stop:
        stop.told = "\nthe chat has ended"
        raise


def respond(line: str, talks: Sequence[Conversation], judge: Reward | None, screen: "Lines") -> None:
    """Do what a command says, or have all models answer, one after the other, and show what they say."""
    question = obey(line, talks) if line.startswith("/") else line
    if question is None:
        return
    with screen:
        for number, talk in enumerate(talks):
            screen.turn_to(number)
            given = talk.ask(question, screen.write)
            score = None
            if judge is not None:
                judge.bind(talk.tokenizer, talk.policy.model.device)
                score = given.score(judge, "reward")
            screen.finish(score)


def obey(line: str, talks: Sequence[Conversation]) -> str | None:
    """Do what a command says; returns the question that is to be answered again, if one is.

    Raises:
        EOFError: the chat is to end.
        UserError: there is no such command, or nothing to answer again.
    """
    name, _, rest = line.partition(" ")
    if name not in COMMANDS:
        near = did_you_mean(name, COMMANDS) or f"; there are {', '.join(COMMANDS)}"
        raise UserError(f"there is no command {name}{near}; a question may begin with a space")
    if name == "/exit":
        raise EOFError
    if name == "/help":
        print(HELP)
    elif name == "/retry":
        questions = [talk.take_back() for talk in talks]
        if questions[0] is None:
            raise UserError("/retry: nothing was asked yet, or the model continues text and remembers none")
        return questions[0]
    else:
        for talk in talks:
            talk.begin((rest.strip() or None) if name == "/system" else talk.system)
    return None


def tell(console: Console, text: str, style: str) -> None:
    """Print a line, which only a terminal wraps."""
    console.print(Text(text, style=style), soft_wrap=True)


def typed_lines() -> Iterator[str]:
    """What a person types, line by line, until Ctrl-D."""
    with suppress(ImportError):  # which Python has on every system but Windows: line editing, and what was typed before
        import readline  # noqa: F401
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if line.strip():
            yield line


def piped_lines() -> Iterator[str]:
    """The lines of a pipe or a file.

    Raises:
        UserError: one is not UTF-8.
    """
    try:
        for line in sys.stdin:
            line.encode()  # in some locales what could not be read is half a character
            if line.strip():
                yield line.rstrip("\r\n")
    except UnicodeError as error:
        raise UserError(f"standard input is not UTF-8 ({error})") from error


@contextmanager
def ctrl_c_ends_the_answer() -> Iterator[None]:
    """While inside, Ctrl-C goes back to the next question."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        print("\n(stopped; the question is forgotten)")
    finally:
        signal.signal(signal.SIGINT, before)


class Lines:
    """Answers as lines of text, one model after the other."""

    def __init__(self, names: Sequence[str], console: Console) -> None:
        self.names, self.console = names, console
        self.number = 0  # of the model that answers

    def __enter__(self) -> None:
        """Before the first answers."""

    def __exit__(self, *error: object) -> None:
        """After the last has answered."""

    def turn_to(self, number: int) -> None:
        """From here on this model answers."""
        self.number = number
        if len(self.names) > 1:
            tell(self.console, f"{self.names[number]}:", "bold")

    def write(self, text: str) -> None:
        """Show a piece of its answer."""
        self.console.file.write(text)
        self.console.file.flush()

    def finish(self, score: float | None) -> None:
        """It has answered, and this is what the reward gives for it, if there is one."""
        self.write("\n")
        if score is not None:
            tell(self.console, f"reward: {score:.4f}", "dim")


class Columns(Lines):
    """Answers in columns, side by side."""

    def __enter__(self) -> None:
        """Draw empty columns."""
        self.texts, self.scores = ["" for _ in self.names], ["" for _ in self.names]
        self.live = Live(console=self.console, auto_refresh=False, get_renderable=self.table)
        self.live.start()

    def __exit__(self, *error: object) -> None:
        """Leave them as they are."""
        self.live.stop()

    def turn_to(self, number: int) -> None:
        """From here on this model answers."""
        self.number = number

    def write(self, text: str) -> None:
        """Show a piece of its answer."""
        self.texts[self.number] += text
        self.live.refresh()

    def finish(self, score: float | None) -> None:
        """It has answered, and this is what the reward gives for it, if there is one."""
        self.scores[self.number] = "" if score is None else f"reward: {score:.4f}"
        self.live.refresh()

    def table(self) -> Table:
        """A column for each model."""
        table = Table(expand=True)
        for name in self.names:
            table.add_column(escape(name), ratio=1, overflow="fold")
        table.add_row(*map(Text, self.texts))
        if any(self.scores):
            table.add_row(*(Text(score, style="dim") for score in self.scores))
        return table
