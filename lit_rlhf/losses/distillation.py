"""How far a student's next-token distributions are from a teacher's: what distillation minimises, token by token.

All are functions of whole distributions, 0 where the two agree and only there. Ids without a token have no probability
with either and add nothing.

Axes: M response tokens, V vocabulary; log-probabilities in nats.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lit_rlhf.engine.shapes import check_shapes
from lit_rlhf.errors import require


@check_shapes
def forward_kl(teacher_logprobs: Float[Tensor, "M V"], student_logprobs: Float[Tensor, "M V"]) -> Float[Tensor, " M"]:
    """KL(p‖q) = Σ p (log p - log q): the student q has to cover all that the teacher p would write.

    Hinton et al. 2015, section 2, https://arxiv.org/abs/1503.02531; GKD's divergence with β → 0.

    Args:
        teacher_logprobs: (M, V) log p; carries no gradient.
        student_logprobs: (M, V) log q.

    Returns:
        (M,) divergences.
    """
    return (teacher_logprobs.exp() * (teacher_logprobs - student_logprobs)).sum(-1)


@check_shapes
def reverse_kl(teacher_logprobs: Float[Tensor, "M V"], student_logprobs: Float[Tensor, "M V"]) -> Float[Tensor, " M"]:
    """KL(q‖p) = Σ q (log q - log p): the student q keeps to what the teacher p would write, and may leave some out.

    Gu et al. 2024 (MiniLLM), section 2.1, https://arxiv.org/abs/2306.08543; GKD's divergence with β → 1.

    Args:
        teacher_logprobs: (M, V) log p; carries no gradient.
        student_logprobs: (M, V) log q.

    Returns:
        (M,) divergences.
    """
    return forward_kl(student_logprobs, teacher_logprobs)


@check_shapes
def generalized_jensen_shannon(
    teacher_logprobs: Float[Tensor, "M V"], student_logprobs: Float[Tensor, "M V"], teacher_share: float = 0.5
) -> Float[Tensor, " M"]:
    """β KL(p‖m) + (1 - β) KL(q‖m), m = β p + (1 - β) q, with β = teacher_share.

    Agarwal et al. 2024 (GKD), Eq. 1, https://arxiv.org/abs/2306.13649. At most log 2 for β = ½; divided by β it goes to
    the forward KL with β → 0, divided by 1 - β to the reverse with β → 1.

    Args:
        teacher_logprobs: (M, V) log p; carries no gradient.
        student_logprobs: (M, V) log q.
        teacher_share: β, the share of the teacher in the mixture; the paper uses 0.1, 0.5 and 0.9.

    Returns:
        (M,) divergences.
    """
    inside = 0 < teacher_share < 1
    require(inside, "teacher_share", teacher_share, "between 0 and 1; at the ends take forward_kl or reverse_kl")
    log_share, log_rest = math.log(teacher_share), math.log1p(-teacher_share)
    mixture = torch.logaddexp(teacher_logprobs + log_share, student_logprobs + log_rest)
    of_teacher, of_student = forward_kl(teacher_logprobs, mixture), forward_kl(student_logprobs, mixture)
    return teacher_share * of_teacher + (1 - teacher_share) * of_student
