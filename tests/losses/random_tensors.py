"""Numbers to try losses on."""

import torch


def randoms(*shape, seed=0):
    """Standard normal float64 numbers, the same at each call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
