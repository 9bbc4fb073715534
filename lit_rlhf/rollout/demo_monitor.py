"""The demo's gold reward as a monitor: it knows the demo's customers alone, and says nothing of other prompts."""

from collections.abc import Mapping

from lightning.pytorch.utilities import rank_zero_warn

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.demo import gold_reward
from lit_rlhf.demo.gold import is_question
from lit_rlhf.rollout.rewards import TextReward
from lit_rlhf.rollout.scoring import Rewards

MOST = 64  # prompts that are looked at


def leave_out_gold(rewards: Rewards, prompts: Mapping[str, PromptBatch]) -> None:
    """Take the gold reward out of what is watched where most prompts are not the demo's; one line says so.

    Its curve would be a further reward to those that look for reward hacking.

    Args:
        rewards: of the run.
        prompts: by split.
    """
    gold = [term for term in rewards.terms if is_gold_monitor(term.option, term.reward)]
    asked = [prompt for batch in prompts.values() for prompt in batch.columns.get("prompt", ())[:MOST]]
    if not gold or not asked or sum(map(is_question, asked)) * 2 >= len(asked):
        return
    rewards.terms = [term for term in rewards.terms if term not in gold]
    rank_zero_warn(
        f"{gold[0].option}: lit_rlhf.demo.gold_reward judges answers to the demo's prompts alone, and those of this "
        "run are others: it is left out; say data.monitors: null, or name a reward of your own"
    )


def is_gold_monitor(option: str, reward: object) -> bool:
    """Whether a reward is the demo's, and only watched."""
    return option.startswith("data.monitors.") and isinstance(reward, TextReward) and reward.function is gold_reward
