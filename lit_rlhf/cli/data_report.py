"""The rows of a config for a terminal, or as plain text in 80 columns."""

import sys
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lit_rlhf.data.overview import Fates, Lengths, Overview
from lit_rlhf.data.viewing import Part, ShownRow, Token

WIDTH, WIDEST = 80, 120  # columns: of plain text, and of a terminal at most
BARS = " ▁▂▃▄▅▆▇█"
MOST, HEAD = (
    96,
    64,
)  # tokens of a run that are written; of a longer one so many of its beginning, and the rest of its end
COLOURS = {
    "system": "magenta",
    "user": "cyan",
    "prompt": "cyan",
    "tool": "yellow",
    "rejected": "red",
    "undesirable": "red",
}
LEGEND = "* and bold = the loss counts it; ‹…› = a control token; ✂ = cut off"


def print_report(head: Mapping[str, Any], looked: Mapping[str, Any]) -> None:
    """Print what `look` found, the heading first."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without these letters
    console = Console(highlight=False)
    console.width = min(console.width, WIDEST) if console.is_terminal else WIDTH
    limit = "any number of" if head["max_length"] is None else f"at most {head['max_length']:,}"
    what = "a prompt" if head["max_tokens"] is None and head["data"] == "RolloutDataModule" else "a row"
    console.print(
        f"{head['data']} for {head['model']}, tokenizer of {head['tokenizer']}, {limit} tokens {what}", markup=False
    )
    for role, one in looked.items():
        console.print(f"\n[bold]{role}[/bold]")
        for line in lines_of(one.overview, one.micro_batches, head["max_tokens"]):
            console.print(Padding(Text(line), (0, 0, 0, 2), expand=False))
        console.print(Padding(lengths_table(one.overview.lengths), (0, 0, 0, 2), expand=False))
    for role, one in looked.items():
        if one.rows:
            console.print(f"\n[bold]rows of {role}, as the model sees them[/bold]")
            console.print(Text(LEGEND))
        for row in one.rows:
            print_row(console, row)


def lines_of(found: Overview, micro_batches: int | None, max_tokens: int | None) -> Iterator[str]:
    """What became of the rows of one role, and what an epoch takes."""
    for source in found.sources:
        yield from fates(source)
    if found.learnt is None:
        epoch = (
            f"{found.examples:,} prompts, {found.tokens:,} tokens; in the loss are the responses that will be played"
        )
    else:
        epoch = f"an epoch: {found.examples:,} examples, {found.tokens:,} tokens"
        epoch += f", {found.learnt:,} of them in the loss ({found.learnt / found.tokens:.1%})"
    if micro_batches is not None:
        epoch += f", {micro_batches:,} micro-batches"
        if max_tokens is not None:
            epoch += f" of up to {max_tokens:,} tokens ({found.tokens / micro_batches / max_tokens:.0%} full)"
    yield epoch
    yield f"duplicates: {found.repeated:,} rows are the same as an earlier one"
    if found.in_train is not None:
        yield (
            f"leaks: {found.in_train:,} rows are in the training data, too; "
            f"{found.prompts_in_train:,} have a prompt that is"
        )


def fates(source: Fates) -> Iterator[str]:
    """The sum of a source's rows, and its parts that say more."""
    dropped = sum(source.dropped.values())
    sums = {"whole": source.whole, "cut": source.cut, "dropped": dropped}
    yield f"{source.source}: {source.read:,} rows read = " + " + ".join(f"{n:,} {what}" for what, n in sums.items())
    for reason, count in source.dropped.items():
        yield f"  {count:,} dropped: {reason}"
    if source.not_taken:
        yield f"  {source.not_taken:,} that could be used are not taken, by the weight of the source"
    if source.empty:
        yield f"  {source.empty:,} of the whole ones with an empty response"
    if source.repeating:
        yield f"  {source.repeating:,} whose response begins with the whole prompt"
    for token, count in list(source.control.items())[:5]:
        yield f"  {count:,} spell out the control token {token}"


def lengths_table(lengths: Mapping[str, Lengths]) -> Table:
    """A line for each part, with a histogram from its least length to its most."""
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 2, 0, 0))
    table.add_column("tokens")
    for name in ("least", "median", "mean", "95 %", "most"):
        table.add_column(name, justify="right")
    table.add_column("least to most", no_wrap=True)
    for name, of in lengths.items():
        numbers = (f"{of.least:,}", f"{of.median:,.0f}", f"{of.mean:,.1f}", f"{of.p95:,.0f}", f"{of.most:,}")
        table.add_row(name, *numbers, bars(of.counts))
    return table


def bars(counts: list[int]) -> str:
    """A histogram in one line; what is above 0 is seen."""
    most, steps = max(counts), len(BARS) - 1
    return "".join(BARS[-(-count * steps // most)] for count in counts)


def print_row(console: Console, row: ShownRow) -> None:
    """A row: where it stands, what became of it, and a line for each run of tokens of one role."""
    console.print(Text(f"\n{row.place}: {row.status}", style="underline"))
    if not row.parts:
        console.print(
            Padding(Text(row.text if len(row.text) <= 240 else f"{row.text[:240]} …"), (0, 0, 0, 2), expand=False)
        )
    for part in row.parts:
        console.print(f"  {part.name}, {len(part.tokens)} tokens")
        console.print(Padding(runs_table(part), (0, 0, 0, 2), expand=False))


def runs_table(part: Part) -> Table:
    """Role, whether it is learnt, and text."""
    table = Table.grid(padding=(0, 1))
    table.add_column(width=15, overflow="fold")
    table.add_column(width=1)
    table.add_column(overflow="fold")
    pieces = (
        (part.tokens[: part.cut_at], False),
        (part.left_out, True),
        (part.tokens[part.cut_at :], False),
    )
    for tokens, is_left_out in pieces:
        if is_left_out and tokens:
            said = "are cut off" if part.tokens else "of which none is used"
            table.add_row("", "✂", Text(f"{len(tokens):,} tokens {said}:"))
        for (role, learnt), run in groupby(tokens, lambda token: (token.role, token.learnt)):
            style = "dim" if is_left_out else f"{'bold ' * learnt}{colour(role, part.name)}"
            table.add_row(Text(role), "*" if learnt else "✂" if is_left_out else "", Text(written(list(run)), style))
    return table


def written(run: list[Token]) -> str:
    """The text of a run, its middle left out where it is long; line breaks are seen."""
    shown: list[Token | str] = [*run]
    if len(run) > MOST:
        shown = [*run[:HEAD], f" … {len(run) - MOST:,} tokens … ", *run[HEAD - MOST :]]
    texts = (
        one if isinstance(one, str) else f"‹{one.text}›" if one.control else one.text.replace("\n", "⏎\n")
        for one in shown
    )
    return "".join(texts).rstrip("\n")


def colour(role: str, part: str) -> str:
    """Of a role, or of the part that is judged."""
    if role.startswith("step"):
        return "red" if role.endswith("wrong") else "green"
    return COLOURS.get(part if part in ("rejected", "undesirable") else role, "green")
