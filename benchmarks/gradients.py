"""Where each loss leads: its mean gradient against that of E[r] - β KL of whole responses, by enumeration.

    python -m benchmarks.gradients [--output docs/data/gradients.jsonl] [--page docs/gradients.md]

One JSON line per row: `method` and `kl` say what is judged, `policy` whether it is the one that wrote the responses
("on") or has moved on from there ("off"); `cosine` and `norm_ratio` hold the mean over all responses against the exact
gradient, `variance` is that of one response's share over the square of the mean. With PEER_PYTHON (TRL 1.16) and
AGILERL_PYTHON set, GRPO's losses of those libraries are judged, too (benchmarks/peer_gradients.py); without, the page
keeps the rows that `output` has of them.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gradient_losses import (
    GROUP_SIZE,
    IN_GROUPS,
    METHODS,
    NORMALISATIONS,
    PENALTIES,
    blind_gae,
    dpo_reports,
    kl_options,
    two_prompts,
    without_scores,
)
from benchmarks.gradient_peers import peer_rows
from lit_rlhf.cli.parser import command
from lit_rlhf.errors import UserError
from lit_rlhf.files import make_room, strict_json, write_lines
from lit_rlhf.oracle import GradientJudge, GradientReport, OnPolicyMethod, Problem

BETA = 0.1
DISTANCE, DRIFT = 1.0, 0.1  # of the policy's logits from the reference's, and of those that played from the policy's
Row = dict[str, Any]
Judges = dict[str, GradientJudge]


def judges(problem: Problem, beta: float) -> Judges:
    """On policy, and after the policy has moved on."""
    policy = problem.table_policy().moved(DISTANCE)
    return {
        "on": GradientJudge(problem, beta, policy),
        "off": GradientJudge(problem, beta, policy, policy.moved(DRIFT, seed=1)),
    }


def rows_of(judges: Judges, said: Row, report: Callable[[GradientJudge], GradientReport]) -> Iterator[Row]:
    """A row on policy and one off policy."""
    for policy, judge in judges.items():
        yield said | {"policy": policy} | report(judge)._asdict()


def kl_rows(problem: Problem) -> Iterator[Row]:
    """The KL alone, each way of charging it, against ∇KL."""
    alone = judges(without_scores(problem), 1.0)
    for option in kl_options():
        kl = f"{option.place}, {option.estimator} of the {option.level}, ratio: {option.ratio}"
        said = {"table": "kl", "method": "KL alone", "kl": kl} | {name: getattr(option, name) for name in COLUMNS["kl"]}
        yield from rows_of(alone, said, lambda judge, loss=option.loss: judge.measure(loss))


def method_rows(problem: Problem) -> Iterator[Row]:
    """Each method with each KL penalty, against ∇J; without one, against ∇E[r]."""
    with_kl, without = judges(problem, BETA), judges(problem, 0.0)
    for name, (algorithm, changes) in METHODS.items():
        size = GROUP_SIZE if name in IN_GROUPS else 1
        for kl, penalty in PENALTIES.items():
            charged = {} if penalty is None else {"kl_penalty": penalty}
            method = OnPolicyMethod.of(algorithm, **changes, **charged)
            said = {"table": "methods", "method": name, "kl": kl}
            held = without if penalty is None else with_kl
            yield from rows_of(held, said, lambda judge, m=method, n=size: judge.measure(m, n))
    blind = OnPolicyMethod.of(METHODS["PPO"][0], advantages=blind_gae)
    said = {"table": "methods", "method": "PPO, critic untaught", "kl": "reward, k1"}
    yield from rows_of(with_kl, said, lambda judge: judge.measure(blind))


def normalisation_rows(problem: Problem, sizes: tuple[int, ...] = (2, GROUP_SIZE)) -> Iterator[Row]:
    """GRPO's divisions one by one, in groups of two and more, against ∇E[r]."""
    plain = {"on": judges(problem, 0.0)["on"]}
    for divided, loss in NORMALISATIONS.items():
        for size in sizes:
            said = {"table": "normalisations", "method": "GRPO", "kl": "none", "divided": divided, "group_size": size}
            yield from rows_of(plain, said, lambda judge, loss=loss, size=size: judge.measure(loss, size))


def dpo_rows(problem: Problem) -> Iterator[Row]:
    """DPO on pairs of the policy, and on pairs of the reference."""
    policy = problem.table_policy().moved(DISTANCE)
    for drawn, old in (("policy", policy), ("reference", problem.table_policy())):
        own, objective = dpo_reports(GradientJudge(problem, BETA, policy, old))
        said = {"table": "dpo", "method": "DPO", "kl": "implicit", "pairs": f"of the {drawn}"}
        said |= {"policy": "on" if old is policy else "off"}
        yield said | {"target": "its own objective"} | own._asdict()
        yield said | {"target": "E[r] - β KL"} | objective._asdict()


def figures(row: Row) -> tuple[str, str, str]:
    """Cosine, norm and variance as they are printed."""
    if row["cosine"] is None or row["cosine"] != row["cosine"]:
        return "–", f"{row['norm_ratio']:.2f}", "–"
    return f"{row['cosine']:.3f}", f"{row['norm_ratio']:.2f}", f"{row['variance']:.3g}"


COLUMNS = {
    "kl": ("place", "estimator", "level", "ratio", "ours"),
    "methods": ("method", "kl"),
    "normalisations": ("divided", "group_size"),
    "dpo": ("pairs", "target"),
    "peers": ("library", "method", "options"),
}
CODE = ("ours", "options")
FIGURES = ("cosine", "norm", "variance")  # as headed
HEADERS = {"ours": "`kl_penalty`", "kl": "KL", "group_size": "G"}


def table(name: str, rows: Iterable[Row]) -> str:
    """A table of the page: on and off policy side by side, where there are both."""
    rows = [row for row in rows if row["table"] == name]
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        said = tuple(f"`{row[key]}`" if key in CODE and row[key] else str(row[key]) for key in COLUMNS[name])
        lines.setdefault(said, []).extend(figures(row))
    both = any(len(numbers) > 3 for numbers in lines.values())
    numbers = [f"{word}, {policy}" if both else word for policy in ("on", "off") for word in FIGURES]
    header = [HEADERS.get(key, key) for key in COLUMNS[name]] + numbers[: None if both else 3]
    body = [[*said, *numbers] for said, numbers in lines.items()]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [header, ["---"] * len(header), *body])


def fill(page: str, rows: list[Row]) -> str:
    """The page with its tables as the rows say."""
    for name in COLUMNS:
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, rest = page.split(begin)
        page = before + begin + table(name, rows) + end + rest.split(end)[1]
    return page


def kept(output: Path | None, measured: set[str]) -> list[Row]:
    """Rows of peers that an earlier run has left, and that this one has not measured."""
    if output is None or not output.exists():
        return []
    rows = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row["table"] == "peers" and row["library"] not in measured]


def main(
    output: str | None = None,
    page: str | None = None,
    peer_python: str | None = os.environ.get("PEER_PYTHON"),
    agilerl_python: str | None = os.environ.get("AGILERL_PYTHON"),
) -> None:
    """Measure, print, and write the page.

    Args:
        output: file for the JSON lines as well, such as docs/data/gradients.jsonl.
        page: whose tables are to be filled, such as docs/gradients.md.
        peer_python: a Python that has TRL 1.16.
        agilerl_python: one that has AgileRL.
    """
    if page is not None and not Path(page).is_file():
        raise UserError(f"page: there is no {page}")
    if output is not None:
        make_room(Path(output), "output", ".jsonl")
    problem = two_prompts()
    rows: list[Row] = []
    pythons = {name: python for name, python in (("trl", peer_python), ("agilerl", agilerl_python)) if python}
    for part in (
        kl_rows(problem),
        method_rows(problem),
        normalisation_rows(problem),
        dpo_rows(problem),
        peer_rows(judges(without_scores(problem), 1.0), judges(problem, BETA), pythons),
    ):
        for row in part:
            rows.append(row)
            print(strict_json(row), flush=True)
    rows += kept(None if output is None else Path(output), {row["library"] for row in rows if row["table"] == "peers"})
    if output is not None:
        write_lines(map(strict_json, rows), Path(output))
    if page is not None:
        write_lines(fill(Path(page).read_text(encoding="utf-8"), rows).splitlines(), Path(page))


if __name__ == "__main__":
    command(main)
