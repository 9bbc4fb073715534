"""Few shapes of products in bfloat16 on a CPU: numbers of rows, and lengths in attention, are rounded up.

There, oneDNN makes a kernel for each shape that it meets and keeps it: 10 ms and 1.9 MB for a number of rows and a
shape of layer, forward and backward, and 4 MB for a length in attention. A run whose batches differ in length would go
on making them, and growing. So rows are added, 2 % on average, whose results nobody reads.

Axes: N nodes, n rows of a bucket and L cells of each, as in `layout.py`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_rlhf.engine.layout import Answers, Layout, SharedPrompts
from lit_rlhf.engine.memory import kind_of

PARTS = 16  # numbers of rows between a power of two and the next
LEAST = 8  # rows between two numbers
WIDTH = 32  # lengths in attention are multiples of it: the kernel is as fast as for those between


def keeps_kernels(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products in this dtype on this device make kernels that are kept."""
    return kind_of(device) == "cpu" and dtype == torch.bfloat16


def rounded(count: int) -> int:
    """The next of few numbers: steps are a sixteenth of the power of two below, and at least 8."""
    step = max(LEAST, (1 << max(0, count - 1).bit_length()) // (2 * PARTS))
    return -(-count // step) * step


def missing_rows(count: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many rows to add to so many, which are multiplied in this dtype on this device."""
    return rounded(count) - count if keeps_kernels(dtype, device) else 0


def add_rows(x: Tensor, more: int) -> Tensor:
    """(n, ...) to (n + more, ...): zeros behind; the tensor itself where there are none to add."""
    return F.pad(x, (*(0, 0) * (x.ndim - 1), 0, more)) if more else x


def drop_rows(x: Tensor, more: int) -> Tensor:
    """(n + more, ...) to (n, ...): no view, of which FSDP2 warns; the tensor itself where none were added."""
    return x[:-more].clone() if more else x


def few_shapes(layout: Layout, dtype: torch.dtype, device: torch.device) -> tuple[Layout, int]:
    """A layout of few lengths, and how many nodes to put behind its own.

    These belong to no sequence; attention gives them what it gives node 0.
    """
    if not keeps_kernels(dtype, device):
        return layout, 0
    more = missing_rows(len(layout.source), dtype, device)
    buckets, source = widened(layout.buckets, layout.source)
    shared = None if layout.shared is None else widened_prompts(layout.shared)
    return layout._replace(buckets=buckets, source=add_rows(source, more), shared=shared), more


def widened_prompts(shared: SharedPrompts) -> SharedPrompts:
    """The same, of few lengths."""
    squares, source = widened(shared.squares, shared.source)
    queries, response_source = widened([each.queries for each in shared.answers], shared.response_source)
    keys, prompt_source = widened([each.keys for each in shared.answers], shared.prompt_source)
    answers = tuple(
        Answers(q, k, each.lengths, widen(each.positions), each.filled and k.shape == each.keys.shape)
        for q, k, each in zip(queries, keys, shared.answers, strict=True)
    )
    return shared._replace(
        squares=squares,
        source=source,
        answers=answers,
        response_source=response_source,
        prompt_source=prompt_source,
    )


def widened(buckets: Sequence[Tensor], source: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Buckets (n, L) of few L, and where nodes stand among their cells, laid end to end, that stood at `source`."""
    wider = tuple(widen(bucket) for bucket in buckets)
    places = torch.cat(
        [
            (torch.arange(each.numel(), device=source.device).view(each.shape))[:, : bucket.shape[1]].flatten() + start
            for each, bucket, start in zip(wider, buckets, starts(wider), strict=True)
        ]
    )
    return wider, places[source]


def widen(bucket: Tensor) -> Tensor:
    """(n, L) to (n, L'): node 0 in the cells behind."""
    return F.pad(bucket, (0, -bucket.shape[1] % WIDTH))


def starts(buckets: Sequence[Tensor]) -> list[int]:
    """Where each begins among the cells of all, laid end to end."""
    ends = [0]
    for bucket in buckets:
        ends.append(ends[-1] + bucket.numel())
    return ends[:-1]
