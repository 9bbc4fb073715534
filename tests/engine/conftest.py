"""What the tests of log-probs share."""

import pytest
import torch
from torch import nn


@pytest.fixture
def problem():
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=True)
    return head, torch.randn(37, 16, requires_grad=True), torch.randint(50, (37,))
