"""lit-rlhf: align language models with PyTorch Lightning.

SFT, reward model, PPO and DPO as LightningModules; `token_mdp` is their environment.
"""

from lit_rlhf.algorithms.dpo import DPO
from lit_rlhf.algorithms.kl_control import AdaptiveKL, FixedKL, KLPenalty
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.algorithms.preference_loss import LossTerm
from lit_rlhf.algorithms.reference_update import ReferenceUpdate
from lit_rlhf.algorithms.reward_model import RewardModel
from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.data.modules import PreferenceDataModule, SFTDataModule
from lit_rlhf.errors import UserError
from lit_rlhf.rollout.data_module import RolloutDataModule
from lit_rlhf.rollout.play import GenerationSettings, RolloutBackend
from lit_rlhf.rollout.rewards import Reward, RewardModelReward, TextReward
from lit_rlhf.rollout.shaping import RewardShaping
from lit_rlhf.rollout.vllm_backend import VLLMBackend

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
    "RolloutBackend",
    "RolloutDataModule",
    "SFTDataModule",
    "TextReward",
    "UserError",
    "VLLMBackend",
]
