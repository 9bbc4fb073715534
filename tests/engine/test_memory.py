import copy

import pytest
import torch
from torch import nn

from lit_rlhf.engine.memory import (
    LiveMemory,
    Numbers,
    bytes_of,
    counting,
    kind_of,
    only_shapes,
    planned_for,
    shapes,
    total_memory,
)


def test_a_storage_counts_once_however_many_tensors_look_at_it():
    weight = torch.zeros(10, 4)  # 160 bytes
    assert bytes_of([weight, weight.t(), weight[2:], weight.view(-1)]) == 160
    assert bytes_of([weight, weight.clone()]) == 320
    assert bytes_of([]) == 0


def test_the_peak_is_what_was_alive_at_one_time():
    memory = LiveMemory()
    with memory:
        a = torch.ones(100)  # 400
        b = a + 1  # 800
        del a  # 400
        c = b.double()  # 400 + 800
        del b, c
        d = torch.ones(50)  # 200
    assert (memory.now, memory.peaks) == (200, {"": 1200})
    del d
    assert memory.now == 0


def test_each_phase_has_a_peak_of_its_own():
    memory = LiveMemory()
    with memory:
        memory.phase = "first"
        a = torch.ones(100)
        memory.phase = "second"
        b = torch.ones(25)
        del b
    assert memory.peaks == {"first": 400, "second": 500}
    del a


def test_what_a_backward_pass_keeps_is_counted_until_it_is_used():
    # exp keeps its result: x (not counted, made before), y 400, their sum 4; then its gradient 400 and x.grad.
    x, memory = torch.ones(100, requires_grad=True), LiveMemory()
    with memory:
        x.exp().sum().backward()
    assert memory.now == 400  # x.grad
    assert memory.peaks[""] >= 800


def test_tensors_without_numbers_count_as_those_with():
    def step():
        layer = nn.Linear(64, 32)
        layer(torch.ones(8, 64)).square().mean().backward()
        return layer

    counts = []
    for numbers in (True, False):
        memory = LiveMemory()
        if numbers:
            with memory:
                layer = step()
        else:
            with shapes(), memory:
                layer = step()
        counts.append((memory.now, memory.peaks[""]))
        del layer
    assert counts[0] == counts[1]


def test_what_is_asked_of_a_number_that_is_not_there_is_one():
    with shapes(), LiveMemory():
        assert only_shapes()
        assert torch.zeros(3).sum().item() == 1.0
        assert bool(torch.zeros(3).isnan().any())
    assert not only_shapes()
    with LiveMemory():
        assert torch.tensor(2.5).item() == 2.5


@pytest.mark.parametrize("copied", [False, True])
def test_weights_without_numbers_meet_data_that_have_them(copied):
    memory = LiveMemory()
    with shapes(), memory:
        embedding = nn.Embedding(10, 4)
        embedding = copy.deepcopy(embedding) if copied else embedding
    with memory:
        assert embedding(torch.tensor([1, 2])).shape == (2, 4)


def test_what_leaves_for_the_host_is_zeros():
    with shapes():
        made = torch.ones(3)
    with counting(LiveMemory()):
        assert (made + 1).tolist() == [1.0, 1.0, 1.0]
        assert (made + 1).cpu().numpy().sum() == 0
        assert type(made.cpu()) is torch.Tensor
        assert type(made[None].cpu()) is not torch.Tensor  # a matrix may be a weight: it stays without numbers
    with Numbers():
        assert torch.ones(2).tolist() == [1.0, 1.0]


def test_modules_without_numbers_can_be_cast():
    with shapes():
        layer = nn.Linear(4, 4).to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.to(torch.float64).weight.dtype == torch.float64


def test_a_device_is_what_a_run_is_planned_for():
    cpu = torch.device("cpu")
    with planned_for("cuda", 24 * 10**9):
        assert (kind_of(cpu), total_memory(cpu)) == ("cuda", 24 * 10**9)
    assert kind_of(cpu) == "cpu" and total_memory(cpu) != 24 * 10**9
