import copy
import re

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lit_rlhf import SFT, UserError
from lit_rlhf.algorithms.optimizers import LEARNT, learnt_by, make_optimizer, require_own_state, require_read_state
from lit_rlhf.algorithms.settings import OptimizerSettings


def test_the_default_is_torchs_adamw_in_one_kernel():
    layer = nn.Linear(2, 2)
    settings = OptimizerSettings(1e-3, 0.1, (0.8, 0.9), 1e-6, "constant", 0)
    optimizer = make_optimizer(settings, settings.groups(layer.parameters(), 1e-3), layer.modules(), fused=True)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]
    assert optimizer.defaults["betas"] == (0.8, 0.9) and optimizer.defaults["eps"] == 1e-6
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


HARM = {  # part of a state, as it stands on its own line below -> what stands there, and what is said of it
    "param_groups[0]['lr']": ("x", "expected a finite number, found str ('x')"),
    "param_groups[1]['weight_decay']": (float("nan"), "expected a finite number, found float (nan)"),
    "param_groups[0]['betas']": ((0.9,), "expected a list of 2, found tuple ((0.9,))"),
    "param_groups[0]['lr'] ": (-1.0, "expected 0 or more, found -1.0"),
    "param_groups[0]['initial_lr']": (-1.0, "expected 0 or more, found -1.0"),
    "param_groups[1]['weight_decay'] ": (-3.0, "expected 0 or more, found -3.0"),
    "param_groups[1]['eps']": (2.0, "expected 0 or more and below 1, found 2.0"),
    "param_groups[0]['eps']": (0.0, "expected 1e-37 or more, found 0.0"),
    "param_groups[1]['betas']": ((1.5, 0.9), "expected 0 or more and below 1, found (1.5, 0.9)"),
    "param_groups[0]['amsgrad']": (True, "expected False, found True"),
    "param_groups[0]['maximize']": (True, "expected False, found True"),
    "param_groups[0]['differentiable']": (True, "expected False, found True"),
    "param_groups[0]['foreach']": (3, "expected None, found 3"),
    "param_groups[0]['params']": ([], "expected a list of 1, found list ([])"),
    "param_groups": ([3, 4], "expected a mapping, found int (3)"),
    "param_groups[0]": ({}, "expected a mapping with params, lr, betas, eps, weight_decay, found dict ({})"),
    "state": (3, "expected a mapping, found int (3)"),
    "state[0]": ({"step": torch.tensor(1.0)}, "expected a mapping with exp_avg, exp_avg_sq, found dict"),
    "state[0]['exp_avg']": (torch.ones(3), "expected a tensor of (2, 2), found one of (3,)"),
    "state[0]['exp_avg_sq']": ("x", "expected a tensor of (2, 2), found str"),
    "state[1]['step']": (torch.ones(2), "expected a tensor of (), found one of (2,)"),
    "state[0]['step']": (torch.tensor(-5.0), "['step']: expected at most 1 steps, found -5"),
    "state[0]['step'] ": (torch.tensor(2.0), "['step']: expected at most 1 steps, found 2"),
    "state[0]['exp_avg_sq'] ": (torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), "['exp_avg_sq']: expected squares, found -1"),
    "state ": ({}, "optimizer_states are not of the weights that had learnt, [[0, 1]]"),
    "last_epoch ": (10**6, "lr_schedulers['last_epoch']: expected 1 steps, found 1000000"),
    "last_epoch": ("x", "expected a whole number from 0 on, found str ('x')"),
    "base_lrs ": ([0.1, -0.1], "expected 0 or more, found [0.1, -0.1]"),
    "base_lrs": ([0.1], "expected a list of 2, found list ([0.1])"),
}


@pytest.mark.parametrize("part", HARM)
def test_states_that_no_step_could_be_computed_with_are_refused_by_file_and_part(part):
    layer = nn.Linear(2, 2)
    settings = OptimizerSettings(1e-3, 0.1, (0.8, 0.9), 1e-6, "constant", 0)
    optimizer = make_optimizer(settings, settings.groups(layer.parameters(), 1e-3), layer.modules(), fused=False)
    schedule = LambdaLR(optimizer, lambda step: 1.0)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    schedule.step()
    states = {"optimizer_states": [optimizer.state_dict()], "lr_schedulers": [schedule.state_dict()]}
    checkpoint = copy.deepcopy(states | {"global_step": 1, LEARNT: learnt_by(states)})
    require_own_state(checkpoint, optimizer, schedule, "a.ckpt")
    value, said = HARM[part]
    place = checkpoint["optimizer_states" if part.startswith(("param", "state")) else "lr_schedulers"][0]
    *above, last = [int(key) if key.isdigit() else key for key in re.findall(r"\w+", part)]
    for key in above:
        place = place[key]
    place[last] = value
    with pytest.raises(UserError, match=rf"^ckpt_path: a\.ckpt is damaged.*{re.escape(said)}"):
        require_own_state(checkpoint, optimizer, schedule, "a.ckpt")


READ = [part for part in HARM if re.match(r"param_groups\[.\]\['(?!params)|state\[", part)]


@pytest.mark.parametrize("part", READ)
def test_a_state_that_a_rank_has_read_by_itself_is_held_to_the_same(part):
    layer = nn.Linear(2, 2)
    settings = OptimizerSettings(1e-3, 0.1, (0.8, 0.9), 1e-6, "constant", 0)
    optimizer = make_optimizer(settings, settings.groups(layer.parameters(), 1e-3), layer.modules(), fused=False)
    LambdaLR(optimizer, lambda step: 1.0)
    made = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    require_read_state(optimizer, made, 1, "a.ckpt")
    value, said = HARM[part]
    where, number, *key = re.findall(r"\w+", part)
    number = int(number)
    place, at = (
        (optimizer.param_groups, number)
        if where == "param_groups"
        else (optimizer.state, [*layer.parameters()][number])
    )
    if key:
        place, at = place[at], key[0]
    place[at] = value
    with pytest.raises(UserError, match=rf"^ckpt_path: a\.ckpt is damaged.*{re.escape(said)}"):
        require_read_state(optimizer, made, 1, "a.ckpt")


def test_8_bits_without_the_package_are_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr("lit_rlhf.models.holding.find_spec", lambda name: None)
    with pytest.raises(UserError, match="optimizer: adamw_8bit needs bitsandbytes, which is not installed"):
        SFT("no folder", optimizer="adamw_8bit")
