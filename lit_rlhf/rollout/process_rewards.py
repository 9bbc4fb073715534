"""A process reward model as the reward: of whole responses, or paid step by step."""

from collections.abc import Sequence

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device

from lit_rlhf.data.examples import response_nodes
from lit_rlhf.engine.packing import Example, pack
from lit_rlhf.models.policy import Scorer
from lit_rlhf.models.roles import OnTrunk


@torch.no_grad()
def step_scores(
    scorer: Scorer | OnTrunk,
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    step_ends: Sequence[np.ndarray],
    max_tokens: int = 8192,
) -> list[np.ndarray]:
    """The log-odds that each step is right, (K,) float64 of each response: one pass over each of them.

    Args:
        scorer: a process reward model.
        prompts: n of (P,) token ids.
        responses: n of (T,).
        step_ends: n of (K,), the places of last tokens in a response.
        max_tokens: of a packed batch, about.
    """
    found: list[np.ndarray] = [np.zeros(0)] * len(prompts)
    lengths = np.array([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)])
    order = np.argsort(lengths, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(lengths[order].cumsum() // max_tokens)) + 1):
        packed = pack([Example(prompts[i], (responses[i],)) for i in rows])
        ends = [step_ends[i] for i in rows]
        nodes = response_nodes(packed, [responses[i] for i in rows], ends).to(scorer.model.device)
        scores = scorer(move_data_to_device(packed, scorer.model.device), nodes).double().cpu().numpy()
        for i, own in zip(rows, np.split(scores, np.cumsum([len(places) for places in ends])[:-1]), strict=True):
            found[i] = own
    return found
