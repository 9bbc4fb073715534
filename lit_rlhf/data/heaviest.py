"""The micro-batches that take most: of those that an epoch is planned to have, or the largest that settings allow."""

from typing import Any

import numpy as np

from lit_rlhf.data.batching import ResumableLoader, TokenBudgetSampler
from lit_rlhf.data.microbatches import MicroBatch

EPOCHS = 3  # whose plans are looked at


def heaviest(loader: ResumableLoader, epochs: int = EPOCHS) -> list[Any]:
    """The batch of most tokens, and that of most items that the loss is over; both may be one."""
    sampler: Any = loader.sampler
    assert isinstance(sampler, TokenBudgetSampler)
    batches = [batch for epoch in range(epochs) for batch in sampler.plan(epoch)]
    chosen = {
        int(np.argmax([amounts[b.indices].sum() for b in batches])) for amounts in (sampler.lengths, sampler.items)
    }
    return [loader.dataset[MicroBatch(batches[number].indices, 1.0)] for number in sorted(chosen)]
