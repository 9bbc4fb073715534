"""What a model's own loss asks for beyond the likelihood: that the experts of a mixture be equally busy."""

import math
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import PreTrainedModel

from lit_rlhf.engine.memory import only_shapes
from lit_rlhf.losses import load_balancing_loss
from lit_rlhf.models.causes import said
from lit_rlhf.models.network import Network
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.trunk import backbone

TOLERANCE = 1e-3  # of the term
LEAST = 1e-5  # nats: of two losses, rounding makes as much


class LoadBalance(NamedTuple):
    """A term `coef` times `load_balancing_loss` with `top_k`."""

    coef: float
    top_k: int


def find_load_balance(network: Network) -> LoadBalance | None:
    """The load-balancing loss that transformers has for this model; None where none is asked for, or it is another.

    Numbers decide: what the model's own loss on a few tokens adds to their likelihood is the term or not.

    Args:
        network: as loaded; told to keep what its routers give, if there is a term.
    """
    model = network.model
    coef, name = coefficient(model), ", ".join(network.read_from) or type(model).__name__
    network.balanced = False
    if coef == 0.0 or not any(p.requires_grad for p in network.parameters()):
        return None
    if only_shapes():  # of a plan, which counts what it takes
        network.balanced = True
        return LoadBalance(coef, 1)
    try:
        term, gaps = compare_terms(network, coef)
    except Exception as error:  # whatever the code of a model raises
        term, gaps, why = 0.0, [math.inf], said(error)
    else:
        why = f"{term:.4g} on a few tokens"
    best = min(range(len(gaps)), key=gaps.__getitem__)
    if gaps[best] > max(TOLERANCE * abs(term), LEAST):
        rank_zero_warn(
            f"{name}: its config asks for a load-balancing loss of its experts (coefficient {coef:g}), which for "
            f"{type(model).__name__} is another than is known here ({why}): it is not trained"
        )
        return None
    rank_zero_info(
        f"{name}: as its config asks, the loss has a load-balancing term, {coef:g} times train/load_balancing_loss"
    )
    network.balanced = True
    return LoadBalance(coef, best + 1)


def compare_terms(network: Network, coef: float) -> tuple[float, list[float]]:
    """What a model's own loss adds to the likelihood, and how far from it ours is with 1, 2, ... experts a token.

    A classifier's own loss leaves it out: there the function counts by which models of its kind compute it.
    """
    model, implementation, was_training = network.model, network.model.config._attn_implementation, network.training
    ids = torch.arange(8).remainder(model.config.get_text_config().vocab_size)[None].to(model.device)
    model.set_attn_implementation("eager")
    network.eval()
    network.switch()
    try:
        with torch.no_grad():
            layers = backbone(model)(input_ids=ids, output_router_logits=True, use_cache=False).router_logits
            layers = tuple(layer.flatten(0, -2) for layer in layers)
            if isinstance(network, Policy):
                own = model(input_ids=ids, labels=ids, use_cache=False)
                term = float(own.loss - F.cross_entropy(own.logits[0, :-1].float(), ids[0, 1:]))
            else:
                theirs = vars(sys.modules[type(backbone(model)).__module__])["load_balancing_loss_func"]
                each = model.config.get_text_config().num_experts_per_tok
                term = coef * float(theirs(layers, layers[0].shape[-1], each))
            routers = torch.cat(layers)
            ours = [coef * float(load_balancing_loss(routers, k + 1)) for k in range(routers.shape[-1])]
    finally:
        model.set_attn_implementation(implementation)
        network.train(was_training)
    return term, [abs(value - term) for value in ours]


def coefficient(model: PreTrainedModel) -> float:
    """Of the load-balancing loss that a config asks for; 0.0 where it asks for none."""
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return 0.0
    settings = [*vars(model).items(), *vars(config).items()]
    return float(next((value for name, value in settings if "aux_loss_coef" in name), None) or 0.0)
