"""How much log-probs and gradients differ between ways of computing the same: sampler, packing, threads, precision.

    python -m benchmarks.numerics

A JSON line for each way: `way`, and `logprobs_mean` and `logprobs_max` (absolute, in nats, of response tokens) or
`gradient` (norm of the difference over that of the gradient), each beside a packed pass of the same micro-batch in
float32 with one thread, unless it says otherwise. Then `rows_alike`: which of 1 to 32 rows a product of matrices
multiplies to the same bits as when they are among 512. Tables come last; docs/numerics.md says where each difference
comes from.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import workload
from benchmarks.rounds import conditions, print_table
from lit_rlhf.engine import layout
from lit_rlhf.engine.attention import IMPLEMENTATION
from lit_rlhf.engine.logprobs import token_logprobs
from lit_rlhf.engine.packing import Example, PackedBatch, pack
from lit_rlhf.models.decoding import SlotDecoder
from lit_rlhf.models.packed_linear import packed_linears
from lit_rlhf.models.policy import Policy

FEW = 2**20  # bytes of logits: the head sees 16 tokens of 16,384 logits at a time


class Work(NamedTuple):
    """A policy and what it reads, each response an example of its own in `rows`."""

    policy: Policy
    examples: list[Example]  # two responses to each prompt
    rows: list[Example]  # the same responses in the order of a packed batch of `examples`

    def packed(self, sharing: float | None = None) -> PackedBatch:
        """All of it; with `sharing`, prompts are attended once where that costs less than this share."""
        with replaced(layout, "SHARED_GAIN", layout.SHARED_GAIN if sharing is None else sharing):
            return pack(self.examples)


def make_work(shape: workload.Shape, num_pairs: int) -> Work:
    """Of the workload that all benchmarks have."""
    policy = Policy(workload.make_model(shape, attn_implementation=IMPLEMENTATION))
    pairs = [{side: np.array(ids) for side, ids in pair.items()} for pair in workload.make_pairs(num_pairs, shape)]
    sides = ("chosen", "rejected")
    return Work(
        policy,
        [Example(pair["prompt"], tuple(pair[side] for side in sides)) for pair in pairs],
        [Example(pair["prompt"], (pair[side],)) for side in sides for pair in pairs],
    )


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """While inside, an attribute has another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """While inside, torch computes with so many."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def read(work: Work, sharing: float | None = None) -> Tensor:
    """Log-probs as a trainer has them, of one micro-batch."""
    return work.policy(work.packed(sharing))[0]


def read_singly(work: Work) -> Tensor:
    """Each response in a micro-batch of its own."""
    return torch.cat([work.policy(pack([row]))[0] for row in work.rows])


def read_by_transformers(work: Work) -> Tensor:
    """Each response by itself, with transformers' own attention."""
    model = work.policy.model
    found: list[Tensor] = []
    model.set_attn_implementation("eager")
    for row in work.rows:
        ids, start = np.concatenate([row.prompt_ids, *row.responses]), len(row.prompt_ids)
        logits = model(torch.from_numpy(ids)[None], use_cache=False).logits[0, start - 1 : -1]
        found.append(torch.log_softmax(logits.float(), -1).gather(-1, torch.from_numpy(ids[start:, None]))[:, 0])
    model.set_attn_implementation(IMPLEMENTATION)
    return torch.cat(found)


def read_in_chunks(work: Work) -> Tensor:
    """With a head that sees a few tokens at a time."""
    batch = work.packed()
    hidden = work.policy.hidden_states(batch, None)[batch.predictors]
    return token_logprobs(work.policy.head, hidden, batch.target_ids, chunk_bytes=FEW)[0]


def sample_again(work: Work, num_slots: int) -> Tensor:
    """As the sampler has them, whose slots write the given responses, so many at a time."""
    found: list[Tensor] = []
    for first in range(0, len(work.rows), num_slots):
        rows = work.rows[first : first + num_slots]
        ids = [np.concatenate([row.prompt_ids, *row.responses]) for row in rows]
        starts, ends = np.array([len(row.prompt_ids) for row in rows]), np.array([len(each) for each in ids])
        observed = np.zeros((len(rows), ends.max()), dtype=np.int64)
        for row, each in zip(observed, ids, strict=True):
            row[: len(each)] = each
        decoder = SlotDecoder(work.policy, len(rows), int(ends.max()))
        logprobs: list[list[Tensor]] = [[] for _ in rows]
        for step in range(int((ends - starts).max())):
            active = starts + step < ends
            logits = decoder.logits(observed, np.where(active, starts + step, starts), active, np.arange(len(rows)))
            slots = np.flatnonzero(active)
            targets = torch.from_numpy(observed[slots, (starts + step)[slots]])[:, None]
            for slot, taken in zip(slots, torch.log_softmax(logits.float(), -1).gather(-1, targets), strict=True):
                logprobs[slot].append(taken)
        found.extend(torch.cat(each) for each in logprobs)
    return torch.cat(found)


def sample_packed(work: Work, num_slots: int) -> Tensor:
    """With weights in the kernel's order, as in a rollout."""
    with packed_linears(work.policy):
        return sample_again(work, num_slots)


@contextmanager
def in_bfloat16() -> Iterator[None]:
    """While inside, as under `bf16-mixed`."""
    with torch.autocast("cpu", torch.bfloat16):
        yield


def inside(context: Callable[[], Any], way: Callable[[Work], Tensor]) -> Callable[[Work], Tensor]:
    """A way of computing, in a context."""

    def entered(work: Work) -> Tensor:
        with context():
            return way(work)

    return entered


LOGPROBS: dict[str, Callable[[Work], Tensor]] = {
    "the same once more": read,
    "each response in a micro-batch of its own": read_singly,
    "whole sequences": lambda work: read(work, 0.0),
    "prompts attended once": lambda work: read(work, float("inf")),
    "two threads": inside(lambda: threads(2), read),
    "a head in chunks": read_in_chunks,
    "transformers' own attention": read_by_transformers,
    "sampler, 1 slot": lambda work: sample_packed(work, 1),
    "sampler, 4 slots": lambda work: sample_packed(work, 4),
    "sampler, 16 slots": lambda work: sample_packed(work, 16),
    "sampler, 16 slots, weights as they are": lambda work: sample_again(work, 16),
    "bfloat16": inside(in_bfloat16, read),
    "sampler, 16 slots, beside the pass, both in bfloat16": inside(in_bfloat16, lambda work: sample_packed(work, 16)),
}
IN_BFLOAT16 = list(LOGPROBS)[-1]


def gradient(work: Work, parts: int = 1) -> Tensor:
    """Of the sum of log-probs, in so many micro-batches: as accumulation or ranks add them up."""
    work.policy.zero_grad()
    for part in range(min(parts, len(work.examples))):
        work.policy(pack(work.examples[part::parts]))[0].sum().backward()
    return torch.cat([p.grad.flatten() for p in work.policy.parameters() if p.grad is not None])


def shared_gradient(work: Work, sharing: float) -> Tensor:
    """With prompts attended once or as often as they are read."""
    with replaced(layout, "SHARED_GAIN", sharing):
        return gradient(work)


GRADIENTS: dict[str, Callable[[Work], Tensor]] = {
    "the same once more": gradient,
    "two micro-batches": lambda work: gradient(work, 2),
    "four micro-batches": lambda work: gradient(work, 4),
    "whole sequences": lambda work: shared_gradient(work, 0.0),
    "prompts attended once": lambda work: shared_gradient(work, float("inf")),
    "two threads": inside(lambda: threads(2), gradient),
    "bfloat16": inside(in_bfloat16, gradient),
}


def rows_alike(inputs: int, outputs: int) -> list[int]:
    """Which numbers of rows, up to 32, come out of a product as they do among 512, to the bit."""
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(n, inputs, generator=generator) for n in (512, outputs))
    among_all = rows @ weight.T
    return [n for n in range(1, 33) if torch.equal(rows[:n] @ weight.T, among_all[:n])]


def main(arguments: list[str] | None = None) -> None:
    """Measure all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(workload.SHAPES), default="small")
    parser.add_argument("--pairs", type=int, default=8)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    conditions(shape=options.shape, pairs=options.pairs)
    work = make_work(workload.SHAPES[options.shape], options.pairs)
    rows: list[list[Any]] = []
    with torch.no_grad():
        expected, rounded = read(work), inside(in_bfloat16, read)(work)
        for way, logprobs in LOGPROBS.items():
            difference = (logprobs(work) - (rounded if way == IN_BFLOAT16 else expected)).abs()
            mean, most = difference.mean().item(), difference.max().item()
            print(json.dumps({"way": way, "logprobs_mean": mean, "logprobs_max": most}), flush=True)
            rows.append([way, f"{mean:.0e}", f"{most:.0e}"])
    print_table("Log-probs", ("way", "mean", "largest"), rows)
    rows, whole = [], gradient(work)
    for way, made in GRADIENTS.items():
        size = ((made(work) - whole).norm() / whole.norm()).item()
        print(json.dumps({"way": way, "gradient": size}), flush=True)
        rows.append([way, f"{size:.0e}"])
    print_table("Gradients", ("way", "difference"), rows)
    width = workload.SHAPES[options.shape].hidden
    print(json.dumps({"rows_alike": rows_alike(width, width), "inputs": width, "outputs": width}), flush=True)


if __name__ == "__main__":
    main()
