"""CUDA graphs of the decode step: in a small model, launching its many short kernels costs more than running them.

A graph needs static shapes and addresses. The number of rows is rounded up to a power of two and the length to a
multiple of `LENGTH_STEP`; the key-value cache is static as it is. Rows beyond the active ones write to position 0 of
parked slots, which nothing reads any more. Graphs live as long as the cache and the ready weights they read: a rollout.

Axes: n rows, L cached length, V vocabulary.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_rlhf.engine.sharding import is_sharded

LENGTH_STEP = 256
NOT_CAPTURABLE: WeakSet[nn.Module] = WeakSet()  # networks with which a capture failed: none is tried again
Step = Callable[[Tensor, Tensor, int], Tensor]  # (n, 1) ids, (n,) positions, L -> (n, V) logits
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


def can_capture(network: nn.Module, device: torch.device) -> bool:
    """Whether decode steps of this network may be captured: on CUDA, with whole weights that stay where they are."""
    return device.type == "cuda" and not is_sharded(network) and network not in NOT_CAPTURABLE


def capture_cuda_graph(function: Callable[[], Tensor], pool: Any) -> Callable[[], Tensor]:
    """Run `function` twice beside the main stream, capture it, and return what replays it.

    What a failed capture leaves behind is undone: torch stays on the stream of the capture, and its generator may go on
    waiting for the capture to end, so that each later draw on the device fails.

    Args:
        function: must not wait for the GPU.
        pool: memory shared with other graphs, none of which may be replayed before the output is read.

    Raises:
        RuntimeError: it cannot be captured.
    """
    current, generator = torch.cuda.current_stream(), torch.cuda.default_generators[torch.cuda.current_device()]
    side, mode = torch.cuda.Stream(), torch.cuda.get_sync_debug_mode()
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that the mode is a prototype
            function()
            torch.cuda.set_sync_debug_mode("error")  # what waits for the GPU fails here, where no capture is to undo
            function()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
        current.wait_stream(side)
    graph, state = torch.cuda.CUDAGraph(), generator.clone_state()
    try:
        with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):  # other threads go on meanwhile
            output = function()
    except RuntimeError:
        torch.cuda.set_stream(current)
        generator.graphsafe_set_state(state)
        raise

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


class GraphedStep:
    """A decode step that is captured once for each shape and replayed from then on; as it is, where capture fails.

    Args:
        network: whose step it is; once a capture failed, none is tried again for it, here or in later rollouts.
        num_rows: rows of the cache.
        max_length: of the cache.
        capture: makes a replayable function of one without arguments; None = `capture_cuda_graph`, in one pool.
    """

    def __init__(self, network: nn.Module, num_rows: int, max_length: int, capture: Capture | None = None) -> None:
        self.network, self.num_rows, self.max_length = network, num_rows, max_length
        self.capture = capture or partial(capture_cuda_graph, pool=torch.cuda.graph_pool_handle())
        self.captured: dict[tuple[int, int], tuple[Tensor, Tensor, Callable[[], Tensor]]] = {}

    def __call__(self, step: Step, input_ids: Tensor, positions: Tensor, length: int) -> Tensor:
        """(n, V) logits; `step` must read nothing but its inputs, the weights and the cache. Args as of `Step`."""
        if self.network in NOT_CAPTURABLE:
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
                NOT_CAPTURABLE.add(self.network)
                cause = error.__context__ or error  # the end of a failed capture raises an error of its own
                rank_zero_warn(f"the decode step cannot be captured in a CUDA graph ({cause}); it runs without, slower")
                return step(input_ids, positions, length)
            self.captured[rows, length] = ids, where, replay
        ids, where, replay = self.captured[rows, length]
        ids[:n], where[:n] = input_ids, positions
        where[n:] = 0
        return replay()[:n]
