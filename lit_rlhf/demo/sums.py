"""Solutions whose steps a program can check: numbers added one by one, with mistakes that are carried on.

Add 3, 4 and 5, one by one.   ->   3 + 4 = 7      right
                                   7 + 5 = 13     wrong, and so would be whatever is added to it
"""

import random
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

SIZES = {"train": 2500, "validation": 256}
LARGEST = 4  # of the numbers that are added
MISTAKES = 0.2  # share of the steps whose sum is wrong, of those that add to a right one

Split = Literal["train", "validation"]


def sum_rows(split: Split = "train") -> list[dict[str, Any]]:
    """Solutions in steps, with a label of each; no prompt of one split occurs in the other.

    Args:
        split: `train` or `validation`.
    """
    rng = random.Random(f"lit-rlhf demo sums {split}")
    drawn = problems(split)
    return [
        {"prompt": [{"role": "user", "content": question(numbers)}]}
        | dict(zip(("completions", "labels"), solution(numbers, rng), strict=True))
        for numbers in (next(drawn) for _ in range(SIZES[split]))
    ]


def problems(split: Split) -> Iterator[tuple[int, ...]]:
    """Numbers to be added, three to five of them; those of validation are the ones whose digits are 0 modulo 8."""
    rng = random.Random(f"lit-rlhf demo problems {split}")
    while True:
        numbers = tuple(rng.randint(1, LARGEST) for _ in range(rng.randint(3, 5)))
        if (int("".join(map(str, numbers))) % 8 == 0) is (split == "validation"):
            yield numbers


def question(numbers: Sequence[int]) -> str:
    """What a customer of sums asks."""
    return f"Add {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}, one by one."


def solution(numbers: Sequence[int], rng: random.Random, mistakes: float = MISTAKES) -> tuple[list[str], list[bool]]:
    """Steps, and whether each of them is right: a sum that builds on a wrong one is wrong.

    Args:
        numbers: to be added.
        rng: where mistakes are drawn from.
        mistakes: share of the steps whose sum is wrong.
    """
    steps, labels, total, right = [], [], numbers[0], True
    for number in numbers[1:]:
        said = total + number
        if rng.random() < mistakes:
            said = max(1, said + rng.choice((-2, -1, 1, 2)))
        right = right and said == total + number
        steps.append(f"{total} + {number} = {said}")
        labels.append(right)
        total = said
    return steps, labels


def right_steps(prompt: str, response: str) -> list[bool]:
    """Whether each line of a response is the step that is due, the first wrong one and all behind it not.

    Args:
        prompt: holds a question.
        response: steps, a line each; empty lines are none.
    """
    numbers = [int(number) for number in re.findall(r"\d+", prompt)]
    totals = [sum(numbers[: count + 1]) for count in range(len(numbers))]
    due = [f"{total} + {n} = {then}" for total, n, then in zip(totals, numbers[1:], totals[1:], strict=False)]
    lines = [line.strip() for line in response.split("\n") if line.strip()]
    return [lines[: count + 1] == due[: count + 1] for count in range(len(lines))]


def sum_reward(prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
    """1 for a response whose last step gives the right sum of all numbers, whatever stands before it; else 0."""
    return [
        float(_last_number(response) == _total(prompt)) for prompt, response in zip(prompts, responses, strict=True)
    ]


def _last_number(response: str) -> int | None:
    found = re.search(r"= (\d+)\s*$", response)
    return int(found[1]) if found else None


def _total(prompt: str) -> int:
    return sum(map(int, re.findall(r"\d+", prompt)))
