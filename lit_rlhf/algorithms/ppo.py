"""Proximal policy optimisation with a KL penalty: generalised advantages, a clipped ratio, and a critic."""

import inspect
from collections.abc import Callable
from typing import Any

from lit_rlhf.algorithms.chosen import ChosenFunction, with_settings
from lit_rlhf.algorithms.on_policy import OnPolicyModule
from lit_rlhf.algorithms.settings import CriticSettings
from lit_rlhf.errors import named_by, require_types
from lit_rlhf.losses import gae, ppo_policy_loss
from lit_rlhf.models.adapter_folders import saved_adapter
from lit_rlhf.models.adapters import LoRA
from lit_rlhf.models.loading import load_scorer, scorer_from_policy
from lit_rlhf.models.policy import Scorer
from lit_rlhf.models.roles import HoldCritic, OnTrunk, add_critic, critic_place, without_head
from lit_rlhf.models.tokens import check_same_tokens, load_tokenizer


class PPO(OnPolicyModule):
    """Proximal policy optimisation: maximise E[r(x, y)] - β KL(π‖π_ref).

    Schulman et al. 2017, https://arxiv.org/abs/1707.06347; for language models Ziegler et al. 2019,
    https://arxiv.org/abs/1909.08593, and Ouyang et al. 2022, https://arxiv.org/abs/2203.02155

    `OnPolicyModule` plays, scores and learns; here are its estimator, its loss and its critic.

    Args:
        policy: folder or hub name of the causal LM to start from, normally the SFT model; also the reference.
        critic: folder or hub name of a reward model to start the critic from; None = the policy's trunk, fresh head.
        hold_critic: where the critic lives: "adapter" = one of its own on the policy's frozen base, with a head;
            "head" = a head alone on what the policy's trunk gives, which learns from both; "model" = a model of its
            own; null = adapter where the policy has a frozen base that is the critic's too, else model.
        lora: train adapters on frozen weights, of policy and critic; null = all weights, or the adapter in policy's
            folder.
        merge_start: fold the adapter in policy's folder into its base before anything else.
        clip_range: ε of the clipped policy ratio.
        clip_range_high: how far the ratio may rise above 1, where that is not ε; null = ε.
        gamma: discount; 1 in RLHF.
        gae_lambda: λ of generalised advantage estimation.
        value_clip_range: the critic may move this far from its value at rollout; null = no clipping.
        value_coef: weight of the critic's loss.
        critic_warmup: first iterations in which the critic alone learns.
        critic_learning_rate: peak rate of the critic; null = learning_rate.
        adam_eps: AdamW's epsilon; PPO's customary 1e-5 damps the steps of parameters that get hardly any gradient.
        advantages: another estimator of advantages, by its import path; it is given gamma and gae_lambda if it names
            them.
        loss: another policy loss, by its import path; it is given clip_range if it names it.
        trust_remote_code: run model code that comes with the weights.
        kwargs: see `OnPolicyModule`.
    """

    prefix = "ppo"
    has_critic = True

    def __init__(
        self,
        policy: str = "demo",
        critic: str | None = None,
        hold_critic: HoldCritic | None = None,
        lora: LoRA | None = None,
        merge_start: bool = False,
        clip_range: float = 0.2,
        clip_range_high: float | None = None,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        value_clip_range: float | None = 0.2,
        value_coef: float = 0.1,
        critic_warmup: int = 0,
        critic_learning_rate: float | None = None,
        adam_eps: float = 1e-5,
        advantages: ChosenFunction | Callable[..., Any] = gae,
        loss: ChosenFunction | Callable[..., Any] = ppo_policy_loss,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> None:
        require_types(PPO.__init__, locals())
        critic_settings = CriticSettings(value_coef, value_clip_range, critic_warmup, critic_learning_rate)
        defaults = inspect.signature(PPO.__init__).parameters
        super().__init__(
            policy,
            advantages=with_settings(advantages, {"gamma": gamma, "gae_lambda": gae_lambda}, defaults),
            loss=with_settings(loss, {"clip_range": clip_range, "clip_range_high": clip_range_high}, defaults),
            adam_eps=adam_eps,
            lora=lora,
            merge_start=merge_start,
            trust_remote_code=trust_remote_code,
            **kwargs,
        )
        self.critic_settings = critic_settings
        with named_by("model.critic"):
            saved = None if critic is None else saved_adapter(critic)
            hold = critic_place(self.policy, hold_critic, critic, saved)
            made: Scorer | OnTrunk
            if hold != "model":
                made = add_critic(self.policy, hold, lora, saved)
            elif critic is not None:
                own = without_head(self.policy, lora)
                made = load_scorer(critic, False, trust_remote_code, own, role="critic", frozen_dtype=self.frozen_dtype)
            elif self.policy.adapters is not None:
                own = without_head(self.policy, lora)
                made = load_scorer(
                    policy, True, trust_remote_code, own, merge_start, "critic", frozen_dtype=self.frozen_dtype
                )
            else:
                made = scorer_from_policy(self.policy, trust_remote_code)
            self.critic = made
            theirs = None if critic is None else load_tokenizer(critic, made.model.config, trust_remote_code)
        if theirs is not None:
            check_same_tokens(self.tokenizer, theirs, f"critic {critic}")
