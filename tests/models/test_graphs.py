from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lit_rlhf.models import graphs
from lit_rlhf.models.decoding import SlotDecoder
from lit_rlhf.models.graphs import LENGTH_STEP, GraphedStep, can_capture, capture_cuda_graph
from lit_rlhf.rollout.play import GenerationSettings, play
from tests.rollout.test_play import make_env
from tests.tiny import VOCABULARY, plain_logits, tiny_policy


class Replayed:
    """Stands in for capture: runs the function anew, and sees that nothing but the static inputs changes."""

    def __init__(self):
        self.captures = 0

    def __call__(self, function):
        self.captures += 1
        function()
        return function


def test_replayed_steps_give_the_logits_of_the_full_forward_through_refills_and_parking():
    policy, capture = tiny_policy(), Replayed()
    S, L = 5, 40
    decoder = SlotDecoder(policy, S, L)
    decoder.graphs = GraphedStep(policy, S, L, capture)
    rng = np.random.default_rng(0)
    ids, lengths, active = np.zeros((S, L), np.int64), np.zeros(S, np.int64), np.ones(S, bool)
    for slot in range(S):
        lengths[slot] = rng.integers(2, 9)
        ids[slot, : lengths[slot]] = rng.integers(3, VOCABULARY, lengths[slot])
    for step in range(16):
        logits = decoder.logits(ids, lengths, active)
        with torch.no_grad():
            expected = [plain_logits(policy.model, ids[s, : lengths[s]])[-1] for s in np.flatnonzero(active)]
        torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-4, atol=1e-4)
        if step == 7:  # a slot starts over, with a prompt of other length
            ids[2] = 0
            ids[2, :3], lengths[2] = (5, 6, 7), 3
        for slot in np.flatnonzero(active):
            ids[slot, lengths[slot]] = rng.integers(3, VOCABULARY)
            lengths[slot] += 1
        if step in (4, 9, 12):
            active[np.flatnonzero(active)[0]] = False
    assert capture.captures == 3  # 5 rows, then 4 (for 4 and 3), then 2


def test_lengths_are_rounded_up_so_that_few_graphs_serve_all():
    shapes = []

    def step(input_ids, positions, length):
        shapes.append((len(input_ids), length))
        return torch.zeros(len(input_ids), 3)

    graphed = GraphedStep(nn.Identity(), num_rows=6, max_length=3 * LENGTH_STEP - 1, capture=Replayed())
    for n, length in [(1, 1), (3, 7), (5, LENGTH_STEP + 1), (6, 3 * LENGTH_STEP - 1), (4, 9)]:
        ids, positions = torch.zeros(n, 1, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
        assert graphed(step, ids, positions, length).shape == (n, 3)
    longest = 3 * LENGTH_STEP - 1
    assert set(shapes) == {(1, LENGTH_STEP), (4, LENGTH_STEP), (6, 2 * LENGTH_STEP), (6, longest)}


def test_a_step_that_cannot_be_captured_runs_as_it_is_and_says_so_once():
    def refuses(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    def step(ids, positions, length):
        return ids * 2.0

    network = nn.Identity()
    graphed = GraphedStep(network, 4, LENGTH_STEP, capture=refuses)
    ids, positions = torch.tensor([[3], [4]]), torch.tensor([0, 1])
    with pytest.warns(UserWarning, match="cannot be captured in a CUDA graph"):
        assert graphed(step, ids, positions, 2).tolist() == [[6.0], [8.0]]
    for again in (graphed, GraphedStep(network, 4, LENGTH_STEP, capture=refuses)):
        assert again(step, ids, positions, 3).tolist() == [[6.0], [8.0]]
    cuda = torch.device("cuda")
    assert can_capture(nn.Identity(), cuda) and not can_capture(network, cuda)


class FailingCuda:
    """Stands in for `torch.cuda` where captures fail as in torch 2.13: neither stream nor generator are put back."""

    def __init__(self):
        self.main, self.captures, self.mode = FakeStream("main"), 0, 0
        self.now, self.default_generators = self.main, [FakeGenerator()]
        self.Stream, self.CUDAGraph = lambda: FakeStream("side"), lambda: None
        self.current_device, self.get_sync_debug_mode = lambda: 0, lambda: self.mode

    def current_stream(self):
        return self.now

    def set_stream(self, stream):
        self.now = stream

    def set_sync_debug_mode(self, mode):
        self.mode = mode

    @contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    @contextmanager
    def graph(self, graph, pool, capture_error_mode):
        self.captures += 1
        self.now = FakeStream("capture")
        self.default_generators[0].state["capturing"] = True
        try:
            yield
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904


class FakeStream:
    def __init__(self, name):
        self.name = name

    def wait_stream(self, other):
        assert {self.name, other.name} == {"main", "side"}


class FakeGenerator:
    def __init__(self, **state):
        self.state = {"capturing": False} | state

    def clone_state(self):
        return FakeGenerator(**self.state)

    def graphsafe_set_state(self, other):
        self.state = other.state


@pytest.mark.parametrize("waits", [True, False])
def test_a_failed_capture_leaves_stream_and_generator_as_they_were_and_its_cause_is_said(monkeypatch, waits):
    cuda = FailingCuda()
    monkeypatch.setattr(graphs, "torch", SimpleNamespace(cuda=cuda))

    def step(ids, positions, length):
        if waits and cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if cuda.now.name == "capture":
            raise RuntimeError("operation not permitted when stream is capturing")
        return ids

    graphed = GraphedStep(nn.Identity(), 1, 8, partial(capture_cuda_graph, pool=None))
    with pytest.warns(UserWarning, match="synchronizing CUDA" if waits else "not permitted when"):
        graphed(step, torch.tensor([[3]]), torch.tensor([0]), 1)
    assert cuda.captures == (0 if waits else 1)
    assert (cuda.now, cuda.mode) == (cuda.main, 0)
    assert cuda.default_generators[0].state == {"capturing": False}


def test_nothing_is_captured_without_cuda():
    policy = tiny_policy()
    assert not can_capture(policy, torch.device("cpu"))
    assert SlotDecoder(policy, 2, 8).graphs is None


@pytest.mark.gpu
def test_graphs_on_cuda_give_the_same_episodes():
    policy = tiny_policy().cuda()
    with_graphs, without = (
        play(policy, make_env(), GenerationSettings(), 11, env_seed=0, cuda_graphs=graphs) for graphs in (True, False)
    )
    assert [e.response_ids.tolist() for e in with_graphs.episodes] == [
        e.response_ids.tolist() for e in without.episodes
    ]
