import pytest
import torch
from torch import nn

from lit_rlhf import SFT, UserError
from lit_rlhf.algorithms.optimizers import make_optimizer
from lit_rlhf.algorithms.settings import OptimizerSettings


def test_the_default_is_torchs_adamw_in_one_kernel():
    layer = nn.Linear(2, 2)
    settings = OptimizerSettings(1e-3, 0.1, (0.8, 0.9), 1e-6, "constant", 0)
    optimizer = make_optimizer(settings, settings.groups(layer.parameters(), 1e-3), layer.modules(), fused=True)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]
    assert optimizer.defaults["betas"] == (0.8, 0.9) and optimizer.defaults["eps"] == 1e-6
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_8_bits_without_the_package_are_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr("lit_rlhf.models.holding.find_spec", lambda name: None)
    with pytest.raises(UserError, match="optimizer: adamw_8bit needs bitsandbytes, which is not installed"):
        SFT("no folder", optimizer="adamw_8bit")
    with pytest.raises(UserError, match=r"optimizer \(sgd\) must be adamw or adamw_8bit"):
        SFT("no folder", optimizer="sgd")
