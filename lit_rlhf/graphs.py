"""CUDA graphs of the decode step: in a small model, launching its many short kernels costs more than running them.

A graph needs static shapes and addresses. The number of rows is rounded up to a power of two and the length to a
multiple of `LENGTH_STEP`; the key-value cache is static as it is. Rows beyond the active ones write to position 0 of
parked slots, which nothing reads any more. Graphs live as long as the cache and the ready weights they read: a rollout.

Axes: n rows, L cached length, V vocabulary.
"""

from collections.abc import Callable

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_rlhf.sharding import is_sharded

LENGTH_STEP = 256
WARM_UPS = 2
Step = Callable[[Tensor, Tensor, int], Tensor]  # (n, 1) ids, (n,) positions, L -> (n, V) logits
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


def can_capture(network: nn.Module, device: torch.device) -> bool:
    """Whether decode steps of this network may be captured: on CUDA, with whole weights that stay where they are."""
    return device.type == "cuda" and not is_sharded(network)


def capture_cuda_graph(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Run `function` a few times beside the main stream, capture it, and return what replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


class GraphedStep:
    """A decode step that is captured once for each shape and replayed from then on; as it is, where capture fails.

    Args:
        num_rows: rows of the cache.
        max_length: of the cache.
        capture: makes a replayable function of one without arguments.
    """

    def __init__(self, num_rows: int, max_length: int, capture: Capture = capture_cuda_graph) -> None:
        self.num_rows, self.max_length, self.capture = num_rows, max_length, capture
        self.captured: dict[tuple[int, int], tuple[Tensor, Tensor, Callable[[], Tensor]]] = {}
        self.can_capture = True

    def __call__(self, step: Step, input_ids: Tensor, positions: Tensor, length: int) -> Tensor:
        """(n, V) logits; `step` must read nothing but its inputs, the weights and the cache. Args as of `Step`."""
        if not self.can_capture:
            return step(input_ids, positions, length)
        n = len(input_ids)
        rows = min(1 << (n - 1).bit_length(), self.num_rows)
        length = min(-(-length // LENGTH_STEP) * LENGTH_STEP, self.max_length)
        if (rows, length) not in self.captured:
            ids, where = input_ids.new_zeros(rows, 1), positions.new_zeros(rows)
            ids[:n], where[:n] = input_ids, positions  # the warm-up writes keys: they must be the right ones
            try:
                replay = self.capture(lambda: step(ids, where, length))
            except RuntimeError as error:  # a model that waits for the GPU in its step (some experts, some embeddings)
                self.can_capture = False
                rank_zero_warn(f"the decode step cannot be captured in a CUDA graph ({error}); it runs without, slower")
                return step(input_ids, positions, length)
            self.captured[rows, length] = ids, where, replay
        ids, where, replay = self.captured[rows, length]
        ids[:n], where[:n] = input_ids, positions
        where[n:] = 0
        return replay()[:n]
