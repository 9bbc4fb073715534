"""lit-rlhf: align language models with PyTorch Lightning.

SFT, reward model, PPO and DPO as LightningModules; `token_mdp` is their environment.
"""

from lit_rlhf.data.modules import PreferenceDataModule, SFTDataModule
from lit_rlhf.data.rollouts import RolloutDataModule
from lit_rlhf.dpo import DPO
from lit_rlhf.errors import UserError
from lit_rlhf.kl import AdaptiveKL, FixedKL, KLPenalty
from lit_rlhf.ppo import PPO
from lit_rlhf.preference_loss import LossTerm
from lit_rlhf.reference_update import ReferenceUpdate
from lit_rlhf.reward_model import RewardModel
from lit_rlhf.rewards import Reward, RewardModelReward, TextReward
from lit_rlhf.rollout import GenerationSettings
from lit_rlhf.sft import SFT
from lit_rlhf.shaping import RewardShaping

__all__ = [
    "DPO",
    "PPO",
    "SFT",
    "AdaptiveKL",
    "FixedKL",
    "GenerationSettings",
    "KLPenalty",
    "LossTerm",
    "PreferenceDataModule",
    "ReferenceUpdate",
    "Reward",
    "RewardModel",
    "RewardModelReward",
    "RewardShaping",
    "RolloutDataModule",
    "SFTDataModule",
    "TextReward",
    "UserError",
]
