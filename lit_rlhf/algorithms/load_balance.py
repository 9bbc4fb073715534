"""What a model's own loss asks for beyond the likelihood: that the experts of a mixture be equally busy."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import PreTrainedModel

from lit_rlhf.losses import load_balancing_loss
from lit_rlhf.models.causes import said
from lit_rlhf.models.policy import Policy

TOLERANCE = 1e-3  # of the term
LEAST = 1e-5  # nats: of two losses, rounding makes as much


class LoadBalance(NamedTuple):
    """A term `coef` times `load_balancing_loss` with `top_k`."""

    coef: float
    top_k: int


def find_load_balance(policy: Policy, name: str) -> LoadBalance | None:
    """The load-balancing loss that transformers' own loss of this model has; None where it has none, or another term.

    Numbers decide: the model's own loss on a few tokens, less their likelihood, is the term or not.

    Args:
        policy: as loaded.
        name: of it, for messages.
    """
    coef = coefficient(policy.model)
    if coef == 0.0:
        return None
    try:
        term, gaps = compare_terms(policy, coef)
    except Exception as error:  # whatever the code of a model raises
        term, gaps, why = 0.0, [math.inf], said(error)
    else:
        why = f"{term:.4g} on a few tokens"
    best = min(range(len(gaps)), key=gaps.__getitem__)
    if gaps[best] > max(TOLERANCE * abs(term), LEAST):
        rank_zero_warn(
            f"{name}: its config asks for a load-balancing loss of its experts (coefficient {coef:g}), which for "
            f"{type(policy.model).__name__} is another than is known here ({why}): it is not trained"
        )
        return None
    rank_zero_info(
        f"{name}: as its config asks, the loss has a load-balancing term, {coef:g} times train/load_balancing_loss"
    )
    return LoadBalance(coef, best + 1)


def compare_terms(policy: Policy, coef: float) -> tuple[float, list[float]]:
    """What a model's own loss adds to the likelihood, and how far from it ours is with 1, 2, ... experts a token."""
    model, implementation, was_training = policy.model, policy.model.config._attn_implementation, policy.training
    ids = torch.arange(8).remainder(policy.vocabulary_size)[None].to(model.device)
    model.set_attn_implementation("eager")
    policy.eval()
    try:
        with torch.no_grad():
            own = model(input_ids=ids, labels=ids, use_cache=False)
            term = float(own.loss - F.cross_entropy(own.logits[0, :-1].float(), ids[0, 1:]))
            layers = model(input_ids=ids, output_router_logits=True, use_cache=False).router_logits
            routers = torch.cat([layer.flatten(0, -2) for layer in layers])
            ours = [coef * float(load_balancing_loss(routers, k + 1)) for k in range(routers.shape[-1])]
    finally:
        model.set_attn_implementation(implementation)
        policy.train(was_training)
    return term, [abs(value - term) for value in ours]


def name_untrained(model: PreTrainedModel, method: str) -> None:
    """Say in a line that a method leaves out the load-balancing loss, where a config asks for it."""
    if coefficient(model) != 0.0:
        rank_zero_info(
            f"{type(model).__name__}: its config asks for a load-balancing loss of its experts (output_router_logits, "
            f"coefficient {coefficient(model):g}), which SFT trains and {method} does not"
        )


def coefficient(model: PreTrainedModel) -> float:
    """Of the load-balancing loss that a config asks for; 0.0 where it asks for none."""
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return 0.0
    settings = [*vars(model).items(), *vars(config).items()]
    return float(next((value for name, value in settings if "aux_loss_coef" in name), None) or 0.0)
