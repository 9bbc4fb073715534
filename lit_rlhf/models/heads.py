"""Models with a scalar head: what transformers calls them, and PEFT their adapters."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from lit_rlhf.errors import UserError

SCALAR_HEAD = "score"  # its name in the classifiers of transformers


class ScalarHeadKind(NamedTuple):
    """What a scalar head was trained to score."""

    auto_class: Any  # of transformers, which loads it
    ending: str  # of the name of such a class
    task_type: str  # of an adapter in PEFT
    named: str  # to a person
    head: str  # likewise
    trained_by: str

    def made(self, architectures: list[str]) -> bool:
        """Whether weights of these classes hold such a head."""
        return any(self.ending in architecture for architecture in architectures)

    def is_random(self, asked: bool) -> str:
        """What to say of scores by a head that was just drawn, because that was `asked`, or as none was stored."""
        why = "fresh_head is true" if asked else f"the model's folder holds no trained {self.head}"
        return (
            f"{why}, so its scores would be random; name a trained {self.named} as model.policy"
            f"{', with model.fresh_head: null' if asked else ''}, or a checkpoint as ckpt_path"
        )


OF_RESPONSES = ScalarHeadKind(
    AutoModelForSequenceClassification,
    "ForSequenceClassification",
    "SEQ_CLS",
    "reward model",
    "reward head",
    "lit_rlhf.RewardModel",
)
OF_STEPS = ScalarHeadKind(
    AutoModelForTokenClassification,
    "ForTokenClassification",
    "TOKEN_CLS",
    "process reward model",
    "head of steps",
    "lit_rlhf.ProcessRewardModel",
)
KINDS = (OF_RESPONSES, OF_STEPS)


def head_kind(architectures: list[str]) -> ScalarHeadKind | None:
    """What the scalar head in weights of these classes scores; None where there is none."""
    return next((kind for kind in KINDS if kind.made(architectures)), None)


def adapter_head_kind(task_type: Any) -> ScalarHeadKind | None:
    """Likewise of an adapter for this task."""
    return next((kind for kind in KINDS if kind.task_type == task_type), None)


def kind_of(model: Any) -> ScalarHeadKind:
    """What the scalar head of a model scores."""
    kind = head_kind([type(model).__name__])
    assert kind is not None, f"{type(model).__name__} has no scalar head"
    return kind


def require_policy(name: Any, kind: ScalarHeadKind | None, known_by: Any) -> None:
    """Refuse what was trained to score where a language model is expected.

    Args:
        name: of a folder, for messages.
        kind: what its scalar head scores; None = it has none.
        known_by: classes of its weights, or the task of its adapter.
    """
    if kind is not None:
        raise UserError(f"{name} holds a {kind.named} ({known_by}), not a policy; name the folder of a causal LM")


@torch.no_grad()
def set_head(model: Any, weight: Tensor | None, shift: Tensor | None) -> None:
    """Give a classifier a trained scalar head.

    Args:
        model: of one label.
        weight: (1, d).
        shift: (1,) its bias, which stands in the config where the model's own head has none; None = as it is.
    """
    model.score.weight.copy_(weight)
    if shift is None:
        return
    if model.score.bias is not None:
        model.score.bias.copy_(shift)
    else:
        model.config.score_bias = float(getattr(model.config, "score_bias", 0.0)) + float(shift)
