"""Rewards that a user names in a word: the folder of a model that scores, or a function of text."""

import pkgutil
from pathlib import Path

from lit_rlhf.errors import UserError, looks_like_a_path, named_by, one_line
from lit_rlhf.models.adapter_folders import saved_adapter
from lit_rlhf.models.heads import OF_RESPONSES, OF_STEPS, ScalarHeadKind, head_kind
from lit_rlhf.models.weights import stored_architectures
from lit_rlhf.rollout.process_rewards import ProcessRewardModelReward
from lit_rlhf.rollout.rewards import Reward, RewardModelReward
from lit_rlhf.rollout.scoring import RewardLike, as_reward

OF_KIND = {OF_RESPONSES: RewardModelReward, OF_STEPS: ProcessRewardModelReward}


def judge_of(given: RewardLike | str, option: str) -> Reward:
    """The reward that a user names.

    Args:
        given: a reward, a function of text, or the import path of one; or the folder or hub name of a reward model, of
            a process reward model, or of an adapter of either.
        option: that names it, for messages.

    Raises:
        UserError: there is nothing of that name, or nothing that scores.
    """
    if not isinstance(given, str):
        return as_reward(given, option)
    if not Path(given).exists() and not looks_like_a_path(given) and "/" not in given:
        return as_reward(_imported(given, option), option)
    with named_by(option):
        kind = stored_head_kind(given)
        if kind is None:
            raise UserError(f"{given} holds no reward model; name the folder that lit_rlhf.RewardModel exports")
        return OF_KIND[kind](given)


def stored_head_kind(name: str | Path) -> ScalarHeadKind | None:
    """What the scalar head of a model or an adapter in a folder scores; None where it has none.

    Raises:
        UserError: there is no model, or it is damaged.
    """
    saved = saved_adapter(name)
    return head_kind(stored_architectures(name)) if saved is None else saved.head_kind


def _imported(path: str, option: str) -> RewardLike:
    try:
        found: RewardLike = pkgutil.resolve_name(path)
    except Exception as error:  # of a module that does not run it may be any
        raise UserError(
            f"{option}: {path} is neither a folder nor the import path of a function ({type(error).__name__}: "
            f"{one_line(error)}); name a reward model's folder, or module.function"
        ) from error
    return found
