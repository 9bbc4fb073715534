"""Several completions of each prompt, what a reward gives for them, and the best."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.errors import UserError, require
from lit_rlhf.losses.selection import best_of_n_kl
from lit_rlhf.models.policy import Policy
from lit_rlhf.rollout.play import GenerationSettings, complete, episode_rows, predicted_rows
from lit_rlhf.rollout.rewards import Reward
from lit_rlhf.rollout.scoring import scored

Keep = Literal["best", "all"]


@dataclass(frozen=True)
class BestOf:
    """Of how many completions of a prompt which are kept.

    Args:
        group_size: completions of each prompt.
        reward: gives each a score; bound to the policy's tokenizer.
        keep: "best" = that of the highest score, the first among equals; "all" = all of them; None = the best where
            there is a reward.
        option: that names the reward, for messages.
    """

    group_size: int = 1
    reward: Reward | None = None
    keep: Keep | None = None
    option: str = "reward"

    def __post_init__(self) -> None:
        """Refuse what leaves no completion, or none that is best."""
        require(self.group_size >= 1, "group_size", self.group_size, "1 or more")
        if self.keep == "best" and self.reward is None:
            raise UserError("keep is best, and no reward says which completion that is: name a reward")

    @property
    def chooses(self) -> bool:
        """Whether one of several is kept."""
        return self.reward is not None and self.keep != "all" and self.group_size > 1

    def rows(
        self, policy: Policy, tokenizer: PreTrainedTokenizerBase, prompts: PromptBatch, settings: GenerationSettings
    ) -> list[dict[str, Any]]:
        """Completions as rows for people and for JSON Lines, those of one prompt together.

        With a reward each has its `score`; the best of several has the `scores` of all beside it.

        Raises:
            UserError: all of several would be the same, or the reward fails.
        """
        if self.group_size > 1 and settings.temperature == 0:
            raise UserError(
                f"group_size ({self.group_size}): at generation.temperature 0 all completions of a prompt are the "
                "same; raise it, such as to 1"
            )
        episodes = complete(policy, tokenizer, prompts, settings, group_size=self.group_size)
        copies = prompts.take(np.repeat(np.arange(len(prompts.prompt_ids)), self.group_size).tolist())
        made = episode_rows(tokenizer, episodes)
        if self.reward is None:
            return predicted_rows(copies, made)
        self.reward.check_columns(copies.columns)
        scores = scored(self.reward, self.option, copies, [episode.response_ids for episode in episodes])
        made = [{**row, "score": score} for row, score in zip(made, scores.tolist(), strict=True)]
        if not self.chooses:
            return predicted_rows(copies, made)
        groups = scores.reshape(-1, self.group_size)
        best = groups.argmax(1) + self.group_size * np.arange(len(groups))
        chosen = [{**made[at], "scores": group.tolist()} for at, group in zip(best, groups, strict=True)]
        return predicted_rows(prompts, chosen)

    def told(self, rows: Sequence[dict[str, Any]]) -> str:
        """What the scores of such rows come to, in words; empty without a reward."""
        if self.reward is None or not rows:
            return ""
        mean = np.mean([row["score"] for row in rows])
        if not self.chooses:
            return f", of a mean score of {mean:.4f}"
        of_all = np.mean([row["scores"] for row in rows])
        kl = best_of_n_kl(self.group_size)
        return (
            f": best of {self.group_size}, of a mean score of {mean:.4f} against {of_all:.4f} of all; KL to the policy "
            f"as it samples at most {kl:.4f} nats, log N - (N - 1)/N"
        )
