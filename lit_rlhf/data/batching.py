"""Micro-batches by token budget: planned over lengths, equal in number on each rank, resumable.

Axes: n examples, W ranks, A accumulation steps. Micro-batch j of an epoch goes to rank j mod W; A consecutive ones of
each rank make one optimiser step.
"""

import bisect
import heapq
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lit_rlhf.data.microbatches import MicroBatch, Plan, flat
from lit_rlhf.errors import UserError, require_alike

PLANS = 2  # another number where other plans are made of the same data: what stopped in mid-epoch goes on with its own
SPARE = 1000  # micro-batches to one more: other epochs' orders need a few more or less
ATTEMPTS = 4  # at an epoch's plan in random order before the examples are placed longest first


class TokenBudgetSampler(DistributedSampler):
    """Deals every example exactly once per epoch, in micro-batches of at most `max_tokens` tokens.

    The gradient of an optimiser step is the mean over the items of that step on all ranks: Lightning divides each loss
    by A (in the shorter last step of an epoch too) and the strategy averages over W ranks, so each micro-batch's sum of
    losses is divided by items of the step / (A W). Where nothing is learnt, the whole pass counts as one step: the mean
    of the micro-batches' losses is the mean over all items.

    The number of micro-batches is the same on each rank, where synchronising strategies would hang, and in each epoch,
    where the Trainer counts on it. It subclasses `DistributedSampler`, which Lightning does not replace.

    Args:
        lengths: (n,) tokens of each example.
        items: (n,) what the loss is a mean over: response tokens; pairs (1 each) if None.
        max_tokens: of a micro-batch; None = no limit.
        batch_size: examples of a micro-batch at most; None = no limit. Where the number of examples does not divide
            among the ranks, up to W - 1 micro-batches hold one more.
        shuffle: deal in an order drawn from (seed, epoch); else in the order of the data, as far as micro-batches can
            be filled so, or by length where nothing is learnt and `max_tokens` limits.
        seed: of the order.
        num_replicas: W.
        rank: this one.
        accumulate_grad_batches: A; None = nothing is learnt.
        limit_batches: micro-batches of each rank that the Trainer will take in an epoch; None = all.
        place: where example i comes from, for messages.

    Raises:
        UserError: no example, fewer examples than ranks, an example longer than `max_tokens`.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        items: np.ndarray | None = None,
        max_tokens: int | None = None,
        batch_size: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        accumulate_grad_batches: int | None = 1,
        limit_batches: int | None = None,
        place: Callable[[int], str] = "example {}".format,
    ) -> None:
        n = len(lengths)
        if n < num_replicas:
            raise UserError(f"{n} examples are too few for {num_replicas} ranks: each needs one; use fewer devices")
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size ({batch_size}) must be 1 or more, or null for no limit")
        if max_tokens is not None and (longest := int(lengths.max())) > max_tokens:
            raise UserError(
                f"{place(int(lengths.argmax()))}: {longest} tokens are more than data.max_tokens ({max_tokens}) allows "
                f"in a micro-batch; raise it to {longest}, or lower data.max_length"
            )
        super().__init__(lengths, num_replicas, rank, shuffle, seed)  # type: ignore[arg-type]
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.items = np.ones(n) if items is None else np.asarray(items, dtype=np.float64)
        self.max_tokens = max_tokens
        self.batch_size = batch_size
        self.accumulate_grad_batches = accumulate_grad_batches
        self.limit_batches = limit_batches
        self.start = 0  # micro-batches to skip when next iterated
        self.longest_first = self._fill(self._by_length(np.random.default_rng(seed)))
        first = 0 if accumulate_grad_batches is None else len(self._fill(self._order(0)))
        count = max(first + first // SPARE, len(self.longest_first))
        self.num_batches = min(-(-count // num_replicas), n // num_replicas)  # on each rank

    def __len__(self) -> int:
        """Micro-batches of this rank in an epoch."""
        return self.num_batches

    def __iter__(self) -> Iterator[MicroBatch]:
        start, self.start = self.start, 0
        mine = self.plan(self.epoch)[self.rank :: self.num_replicas]
        yield from (self._with_step(mine, number) for number in range(start, len(mine)))

    def plan(self, epoch: int) -> Plan:
        """The micro-batches of all ranks in an epoch."""
        total = self.num_batches * self.num_replicas
        batches = self.longest_first
        if self.max_tokens is None and not self.shuffle:
            batches = [chunk.tolist() for chunk in np.array_split(np.arange(len(self.lengths)), total)]
        elif self.accumulate_grad_batches is None:
            batches = self._adjust(batches, total)
        else:
            rng = np.random.default_rng([self.seed, epoch, 1])
            for attempt in range(ATTEMPTS):
                if len(drawn := self._fill(self._order(epoch, attempt))) <= total:
                    batches = drawn
                    break
            else:  # too many micro-batches in each order tried; longest first needs the fewest
                batches = self._fill(self._by_length(rng))
            batches = self._adjust(batches, total)
            batches = [batches[j] for j in rng.permutation(total)] if self.shuffle else sorted(batches, key=min)
        return self._with_denominators(batches)

    def _with_step(self, mine: Sequence[MicroBatch], number: int) -> MicroBatch:
        """A micro-batch of this rank; of an optimiser step the first knows which belong to it."""
        steps = self.accumulate_grad_batches
        if steps is None:
            return mine[number]
        taken = min(self.num_batches, self.limit_batches or self.num_batches)
        last = min(number + steps, taken) if number < taken else number + steps
        step = tuple(batch.indices for batch in mine[number:last]) if number % steps == 0 else ()
        return mine[number]._replace(step=step)

    def fingerprint(self) -> int:
        """Changes with anything that changes the plan."""
        settings = (PLANS, self.max_tokens, self.batch_size, self.shuffle, self.seed, self.num_replicas)
        return zlib.crc32(repr(settings).encode(), zlib.crc32(self.lengths.tobytes()))

    def _order(self, epoch: int, attempt: int = 0) -> np.ndarray:
        rng, n = np.random.default_rng([self.seed, epoch, 0, attempt]), len(self.lengths)
        return rng.permutation(n) if self.shuffle else np.arange(n)

    def _by_length(self, rng: np.random.Generator) -> np.ndarray:
        shuffled = rng.permutation(len(self.lengths)) if self.shuffle else np.arange(len(self.lengths))
        return shuffled[np.argsort(-self.lengths[shuffled], kind="stable")]

    def _fill(self, order: np.ndarray) -> list[list[int]]:
        """Place each example in the fullest micro-batch that has room, or in a new one (best fit)."""
        budget = int(self.lengths.sum()) if self.max_tokens is None else self.max_tokens
        size = len(order) if self.batch_size is None else self.batch_size
        shortest = int(self.lengths.min())
        batches: list[list[int]] = []
        rooms: list[int] = []  # numbers of tokens for which micro-batches have room, ascending
        having: dict[int, list[int]] = {}  # a room -> heap of the micro-batches that have it
        for example, length in zip(order.tolist(), self.lengths[order].tolist(), strict=True):
            at = bisect.bisect_left(rooms, length)
            if at < len(rooms):
                room = rooms[at]
                batch = heapq.heappop(having[room])
                if not having[room]:
                    del rooms[at], having[room]
            else:
                room, batch = budget, len(batches)
                batches.append([])
            batches[batch].append(example)
            left = room - length
            if left >= shortest and len(batches[batch]) < size:
                if left in having:
                    heapq.heappush(having[left], batch)
                else:
                    having[left] = [batch]
                    bisect.insort(rooms, left)
        return batches

    def _adjust(self, batches: list[list[int]], total: int) -> list[list[int]]:
        """Split the largest micro-batches, or join the smallest, until there are `total`."""
        if len(batches) == total:
            return batches

        def tokens(batch: list[int]) -> int:
            return int(self.lengths[batch].sum())

        rows, ends = flat(batches)
        lengths = np.add.reduceat(self.lengths[rows], ends[:-1]).tolist()
        if len(batches) > total:  # only where each holds one example
            queue = list(zip(lengths, batches, strict=True))
            heapq.heapify(queue)
            while len(queue) > total:
                (_, one), (_, other) = heapq.heappop(queue), heapq.heappop(queue)
                heapq.heappush(queue, (tokens(one + other), one + other))
                if self.max_tokens is not None and tokens(one + other) > self.max_tokens:
                    raise UserError(
                        f"{len(self.lengths)} examples do not divide among {self.num_replicas} ranks while one fits "
                        f"into max_tokens ({self.max_tokens}); raise it to {tokens(one + other)}"
                    )
            return [batch for _, batch in queue]
        missing = total - len(batches)
        divisible = [number for number, batch in enumerate(batches) if len(batch) > 1]
        candidates = set(heapq.nlargest(missing, divisible, key=lambda number: lengths[number]))  # none beyond is split
        done = [batch for number, batch in enumerate(batches) if number not in candidates]
        queue = [(-lengths[number], batches[number]) for number in sorted(candidates)]
        heapq.heapify(queue)
        while len(done) + len(queue) < total:
            largest = sorted(heapq.heappop(queue)[1], key=lambda example: -self.lengths[example])
            for half in (largest[::2], largest[1::2]):
                if len(half) > 1:
                    heapq.heappush(queue, (-tokens(half), half))
                else:
                    done.append(half)
        return done + [batch for _, batch in queue]

    def _with_denominators(self, batches: list[list[int]]) -> Plan:
        taken = min(self.num_batches, self.limit_batches or self.num_batches)
        steps = taken if self.accumulate_grad_batches is None else self.accumulate_grad_batches
        local = np.arange(len(batches)) // self.num_replicas
        step = local // steps
        rows, ends = flat(batches)
        items = np.add.reduceat(self.items[rows], ends[:-1])
        # Micro-batches beyond the Trainer's limit are never learnt from; a step that the limit cuts is shorter.
        totals = np.bincount(
            step, weights=np.where((local < taken) | (local // steps > (taken - 1) // steps), items, 0)
        )
        denominators = totals[step] / (steps * self.num_replicas)
        return Plan(rows, ends, denominators)


class ResumableLoader(DataLoader):
    """A DataLoader over a `TokenBudgetSampler` that goes on in mid-epoch where its state was taken.

    Lightning saves and restores the state with the checkpoint. It counts the micro-batches handed out, not those that
    workers have fetched ahead.
    """

    def __init__(self, dataset: Dataset, sampler: TokenBudgetSampler, num_workers: int = 0, **kwargs: Any) -> None:
        kwargs = {"batch_size": None, "collate_fn": as_it_is, **kwargs}
        super().__init__(dataset, sampler=sampler, num_workers=num_workers, **kwargs)
        self.before_epoch: Callable[[], Any] = lambda: None  # done as the first micro-batch of a pass is wanted
        self._taken = (0, 0)  # epoch, micro-batches handed out in it
        self._resume: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: nothing is planned or fetched before the first batch is wanted. The Trainer creates the iterator
        # before it says which epoch a resumed run is in.
        sampler = self.sampler
        assert isinstance(sampler, TokenBudgetSampler), "the sampler of a ResumableLoader was replaced"
        epoch, start = sampler.epoch, 0
        if self._resume is not None and self._resume[0] == epoch:
            start = self._resume[1]
        self._resume = None
        self._taken = (epoch, start)
        sampler.start = start
        self.before_epoch()
        for batch in super().__iter__():
            self._taken = (epoch, self._taken[1] + 1)
            yield batch

    def rewind(self) -> None:
        """Begin the epoch anew, wherever a state was to be gone on from."""
        self._resume = None

    def state_dict(self) -> dict[str, int]:
        """The epoch, the micro-batches of it that were handed out, and what they were planned from."""
        assert isinstance(self.sampler, TokenBudgetSampler)
        epoch, taken = self._taken if self._resume is None else self._resume
        accumulate = self.sampler.accumulate_grad_batches or 1
        plan = self.sampler.fingerprint()
        return {"epoch": epoch, "taken": taken, "length": len(self), "plan": plan, "accumulate": accumulate}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where `state` was taken.

        Raises:
            UserError: in mid-epoch, if data, budget, ranks or accumulation are others now.
        """
        sampler = self.sampler
        assert isinstance(sampler, TokenBudgetSampler)
        mine = {"epoch": 0, "taken": 0, "length": 0, "plan": sampler.fingerprint()}
        require_alike(state, mine, "it is damaged: its combined_loader", tuple(mine))
        if state["taken"] > state["length"]:
            most = f"expected at most {state['length']}, found {state['taken']}"
            raise UserError(f"it is damaged: its combined_loader['taken']: {most}")
        before, now = state.get("accumulate"), sampler.accumulate_grad_batches or 1  # older checkpoints do not say
        if 0 < state["taken"] < state["length"] and before not in (None, now):
            raise UserError(
                f"accumulate_grad_batches ({now}) was {before} when it was taken in the middle of epoch "
                f"{state['epoch']}: its next step would not be the mean of its rows; resume with {before}, or from a "
                "checkpoint of an epoch's end"
            )
        if 0 < state["taken"] < state["length"] and state["plan"] != sampler.fingerprint():
            raise UserError(
                f"it stopped after {state['taken']} micro-batches of epoch {state['epoch']}, but data, "
                "max_tokens, batch_size, seed or the number of ranks have changed, so what is left is unknown; resume "
                "with the same, or from a checkpoint of an epoch's end"
            )
        if state["plan"] != sampler.fingerprint():
            rank_zero_warn(
                "the checkpoint comes from a run with other data, max_tokens, batch_size, seed or number of ranks; "
                "the epochs that are left are planned from what is given now"
            )
        sampler.set_epoch(state["epoch"])
        self._resume = (state["epoch"], state["taken"])


def as_it_is(batch: Any) -> Any:
    """The collate function of batches that come packed."""
    return batch
