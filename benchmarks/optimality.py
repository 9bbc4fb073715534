"""Every algorithm against the closed form, on token MDPs small enough to list all completions.

    python benchmarks/optimality.py [--output docs/data/optimality.jsonl] [--problems '[trap]'] [--betas '[0.1]']

One JSON line per (algorithm, MDP, β), then a table. The losses, estimators and the environment are the project's own;
the policies are tables of logits, which can be the optimum exactly: what is left is the algorithm's own error.
`gap` is (J* - J)/(J* - J_ref), 0 at the optimum of E[r] - β KL and 1 at the reference; `kl_to_optimum` is KL(π‖π°) in
nats, π° being that optimum, or for losses that have another one (`optimum`: "own") theirs.

The MDP "words" is for `lit_rlhf.PPO` and `lit_rlhf.DPO` themselves, on a tiny Llama (benchmarks/words.py); with
PEER_PYTHON and PEER_PPO_PYTHON set (docs/performance.md), TRL's trainers learn it from as many episodes and pairs. Its
lines hold the seed in the middle by KL, the range over all seeds, and the seconds of all.

Methods without a critic (benchmarks/table_family.py) take an hour and more, and are named where they are wanted:

    python benchmarks/optimality.py --algorithms '[rloo, grpo]' --betas '[0.1]'
"""

import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script finds its neighbours only so

from benchmarks.siblings import SIBLINGS
from benchmarks.table_family import FAMILY, learn_member
from benchmarks.table_ppo import learn_ppo
from benchmarks.table_preferences import (
    calibration_error,
    exact_pairs,
    expected_kl,
    gathered,
    implicit_reward_correlation,
    kl_to,
    learn_preferences,
    learn_reward_model,
    sampled_pairs,
    table_of,
)
from benchmarks.words import make_reference, measure_words
from lit_rlhf.cli.parser import command
from lit_rlhf.errors import UserError, require
from lit_rlhf.files import make_room, write_lines
from lit_rlhf.losses import dpo_loss
from lit_rlhf.oracle import Oracle, Problem, TablePolicy, optimal_logprobs, small_problems

BETAS = (0.05, 0.1, 0.5, 1.0)
WORD_BETAS = (0.1, 0.5)
ON_WORDS = ("trl_ppo", "trl_dpo", "ppo_module", "dpo_module")  # the slowest first, so that no process ends alone
ALGORITHMS = ("ppo", *SIBLINGS, "dpo_sampled", "reward_model", *ON_WORDS)
Line = dict[str, Any]


def measure(problem_name: str, algorithm: str, beta: float) -> Line:
    """The line of an algorithm on tables."""
    problem = next(p for p in small_problems() if p.name == problem_name)
    oracle = FAMILY[algorithm].oracle(problem, beta) if algorithm in FAMILY else problem.oracle(beta)
    start = time.process_time()
    policy, more = learn(problem, oracle, algorithm, beta)
    evaluation = oracle.evaluate(policy.logprob_fn)
    figures = {"gap": evaluation.gap, "kl_to_optimum": evaluation.kl_to_optimum}
    seconds = time.process_time() - start
    return {"algorithm": algorithm, "mdp": problem_name, "beta": beta} | figures | {"seconds": seconds} | more


def learn(problem: Problem, oracle: Oracle, algorithm: str, beta: float) -> tuple[TablePolicy, Line]:
    """The policy that an algorithm finds, and what else there is to say about it."""
    if algorithm == "ppo":
        return learn_ppo(problem, beta), {}
    if algorithm in FAMILY:
        return learn_member(problem, beta, FAMILY[algorithm]), {}
    if algorithm == "dpo_sampled":
        count = 1_000_000
        policy = learn_preferences(problem, oracle, dpo_loss, gathered(sampled_pairs(oracle, count)))
        return policy, {"pairs": count, "expected_kl": expected_kl(oracle, count)}
    if algorithm == "reward_model":
        scores = learn_reward_model(oracle, exact_pairs(oracle))
        error = scores - oracle.rewards
        reward_error = (error - error.mean(1, keepdim=True)).abs().max().item()
        more = {"reward_error": reward_error, "calibration_error": calibration_error(oracle, scores)}
        return table_of(problem, oracle, optimal_logprobs(oracle.ref_logprobs, scores, beta)), more
    sibling = SIBLINGS[algorithm]
    policy = sibling.learn(problem, oracle)
    if sibling.optimum is None:
        return policy, {"correlation": implicit_reward_correlation(oracle, policy)}
    return policy, {"kl_to_optimum": kl_to(oracle, policy, sibling.own_optimum(oracle)), "optimum": "own"}


def print_table(rows: list[Line], algorithms: tuple[str, ...]) -> None:
    """Gap and KL by algorithm and β, the worst over the MDPs."""
    table = Table(title="Worst over the MDPs: gap | KL to the optimum [nats]", title_justify="left")
    table.add_column("algorithm")
    betas = sorted({row["beta"] for row in rows})
    for beta in betas:
        table.add_column(f"β = {beta:g}", justify="right")
    for algorithm in algorithms:
        cells = []
        for beta in betas:
            ours = [row for row in rows if row["algorithm"] == algorithm and row["beta"] == beta]
            if not ours:
                cells.append("")
                continue
            gap, kl = (max(row[key] for row in ours) for key in ("gap", "kl_to_optimum"))
            cells.append(f"{'own' if 'optimum' in ours[0] else f'{gap:.3%}'} | {kl:.5f}")
        if any(cells):
            table.add_row(algorithm, *cells)
    Console(width=120).print(table)


def lines(jobs: list[tuple[Callable[..., Line], *tuple[Any, ...]]], processes: int) -> Iterator[Line]:
    """What the jobs answer, in the order in which they are done, each computed by one thread."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for done in as_completed([pool.submit(*job) for job in jobs]):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)  # an error or Ctrl-C does not wait for what has not begun


def main(
    output: str | None = None,
    problems: tuple[str, ...] = ("random", "wide", "long", "sparse", "trap", "words"),
    betas: tuple[float, ...] = BETAS,
    algorithms: tuple[str, ...] = ALGORITHMS,
    processes: int = os.cpu_count() or 1,
    peer_python: str | None = os.environ.get("PEER_PYTHON"),
    peer_ppo_python: str | None = os.environ.get("PEER_PPO_PYTHON"),
) -> None:
    """Measure and print.

    Args:
        output: file for the JSON lines as well, such as docs/data/optimality.jsonl.
        problems: names among `small_problems`, and words.
        betas: weights of the KL; on words, those of them that are in WORD_BETAS.
        algorithms: names as in the lines; those without a critic (`FAMILY`) are none unless they are named.
        processes: that work side by side, on one thread each.
        peer_python: a Python that has TRL, for trl_dpo; without one it is left out.
        peer_ppo_python: one that has TRL 1.12, for trl_ppo.
    """
    for option, given, known in (
        ("problems", problems, [*(problem.name for problem in small_problems()), "words"]),
        ("algorithms", algorithms, (*ALGORITHMS, *FAMILY)),
    ):
        if unknown := [name for name in given if name not in known]:
            raise UserError(f"{option}: unknown {', '.join(unknown)}; there are {', '.join(known)}")
        require(len(given) > 0, option, given, "one name at least")
    require(len(betas) > 0 and min(betas) > 0, "betas", betas, "one at least, each more than 0")
    require(processes >= 1, "processes", processes, "1 or more")
    if output is not None:
        make_room(Path(output), "output", ".jsonl")
    pythons = {"trl_ppo": peer_ppo_python, "trl_dpo": peer_python}
    playing = [name for name in ON_WORDS if name in algorithms and (name not in pythons or pythons[name])]
    with tempfile.TemporaryDirectory() as folder:
        jobs: list[Any] = []
        if "words" in problems and playing:
            torch.set_num_threads(1)  # as in the jobs: what is learnt must not depend on the number of cores
            make_reference(Path(folder))
            cells = itertools.product(playing, (beta for beta in betas if beta in WORD_BETAS))
            jobs += [(measure_words, Path(folder), name, beta, pythons.get(name)) for name, beta in cells]
        on_tables = [name for name in algorithms if name not in ON_WORDS]
        tables = [p.name for p in small_problems() if p.name in problems]
        jobs += [(measure, *job) for job in itertools.product(tables, on_tables, betas)]
        rows = []
        for row in lines(jobs, processes):
            rows.append(row)
            print(json.dumps(row), flush=True)
    place = {name: number for number, name in enumerate(problems)}
    rows.sort(key=lambda row: (place[row["mdp"]], row["beta"], algorithms.index(row["algorithm"])))
    print_table(rows, algorithms)
    if output is not None:
        write_lines(map(json.dumps, rows), Path(output))


if __name__ == "__main__":
    command(main)
