"""lit-rlhf: align language models with PyTorch Lightning.

SFT, reward models, PPO, its siblings without a critic, and DPO as LightningModules; `token_mdp` is their environment.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_rlhf.algorithms.cpo import CPO
    from lit_rlhf.algorithms.dapo import DAPO
    from lit_rlhf.algorithms.distillation import Distillation, OnPolicyDistillation
    from lit_rlhf.algorithms.dpo import DPO
    from lit_rlhf.algorithms.dr_grpo import DrGRPO
    from lit_rlhf.algorithms.grpo import GRPO
    from lit_rlhf.algorithms.kl_control import AdaptiveKL, FixedKL, KLPenalty
    from lit_rlhf.algorithms.kto import KTO
    from lit_rlhf.algorithms.online_dpo import OnlineDPO
    from lit_rlhf.algorithms.orpo import ORPO
    from lit_rlhf.algorithms.ppo import PPO
    from lit_rlhf.algorithms.preference_loss import LossTerm
    from lit_rlhf.algorithms.process_reward_model import ProcessRewardModel
    from lit_rlhf.algorithms.raft import RAFT
    from lit_rlhf.algorithms.reference_update import ReferenceUpdate
    from lit_rlhf.algorithms.reinforce import REINFORCE
    from lit_rlhf.algorithms.reinforce_plus_plus import REINFORCEPlusPlus
    from lit_rlhf.algorithms.remax import ReMax
    from lit_rlhf.algorithms.reward_model import RewardModel
    from lit_rlhf.algorithms.rloo import RLOO
    from lit_rlhf.algorithms.sft import SFT
    from lit_rlhf.algorithms.simpo import SimPO
    from lit_rlhf.data.modules import PreferenceDataModule, SFTDataModule, StepwiseDataModule, UnpairedDataModule
    from lit_rlhf.errors import UserError
    from lit_rlhf.models.adapters import LoRA
    from lit_rlhf.rollout.data_module import RolloutDataModule
    from lit_rlhf.rollout.ensemble import EnsembleReward
    from lit_rlhf.rollout.play import GenerationSettings, RolloutBackend
    from lit_rlhf.rollout.process_rewards import ProcessRewardModelReward
    from lit_rlhf.rollout.rewards import Reward, RewardModelReward, TextReward
    from lit_rlhf.rollout.shaping import RewardShaping
    from lit_rlhf.rollout.vllm_backend import VLLMBackend

HOMES = {  # of the public names: a file is read when one of its names is asked for, torch not before
    "DAPO": "algorithms.dapo",
    "CPO": "algorithms.cpo",
    "DPO": "algorithms.dpo",
    "Distillation": "algorithms.distillation",
    "OnPolicyDistillation": "algorithms.distillation",
    "DrGRPO": "algorithms.dr_grpo",
    "GRPO": "algorithms.grpo",
    "OnlineDPO": "algorithms.online_dpo",
    "RAFT": "algorithms.raft",
    "REINFORCE": "algorithms.reinforce",
    "REINFORCEPlusPlus": "algorithms.reinforce_plus_plus",
    "RLOO": "algorithms.rloo",
    "ORPO": "algorithms.orpo",
    "SimPO": "algorithms.simpo",
    "ReMax": "algorithms.remax",
    "AdaptiveKL": "algorithms.kl_control",
    "FixedKL": "algorithms.kl_control",
    "KLPenalty": "algorithms.kl_control",
    "KTO": "algorithms.kto",
    "PPO": "algorithms.ppo",
    "LossTerm": "algorithms.preference_loss",
    "ProcessRewardModel": "algorithms.process_reward_model",
    "ReferenceUpdate": "algorithms.reference_update",
    "RewardModel": "algorithms.reward_model",
    "SFT": "algorithms.sft",
    "PreferenceDataModule": "data.modules",
    "SFTDataModule": "data.modules",
    "StepwiseDataModule": "data.modules",
    "UnpairedDataModule": "data.modules",
    "UserError": "errors",
    "LoRA": "models.adapters",
    "RolloutDataModule": "rollout.data_module",
    "EnsembleReward": "rollout.ensemble",
    "GenerationSettings": "rollout.play",
    "RolloutBackend": "rollout.play",
    "ProcessRewardModelReward": "rollout.process_rewards",
    "Reward": "rollout.rewards",
    "RewardModelReward": "rollout.rewards",
    "TextReward": "rollout.rewards",
    "RewardShaping": "rollout.shaping",
    "VLLMBackend": "rollout.vllm_backend",
}

__all__ = [
    "CPO",
    "DAPO",
    "DPO",
    "GRPO",
    "KTO",
    "ORPO",
    "PPO",
    "RAFT",
    "REINFORCE",
    "RLOO",
    "SFT",
    "AdaptiveKL",
    "Distillation",
    "DrGRPO",
    "EnsembleReward",
    "FixedKL",
    "GenerationSettings",
    "KLPenalty",
    "LoRA",
    "LossTerm",
    "OnPolicyDistillation",
    "OnlineDPO",
    "PreferenceDataModule",
    "ProcessRewardModel",
    "ProcessRewardModelReward",
    "REINFORCEPlusPlus",
    "ReMax",
    "ReferenceUpdate",
    "Reward",
    "RewardModel",
    "RewardModelReward",
    "RewardShaping",
    "RolloutBackend",
    "RolloutDataModule",
    "SFTDataModule",
    "SimPO",
    "StepwiseDataModule",
    "TextReward",
    "UnpairedDataModule",
    "UserError",
    "VLLMBackend",
]


def __getattr__(name: str) -> Any:
    """A public name, from its file; `__version__`, from the installed package, which has it from pyproject.toml."""
    if name == "__version__":
        return version("lit-rlhf")
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    """The public names, beside what is there."""
    return sorted({*globals(), *HOMES})
