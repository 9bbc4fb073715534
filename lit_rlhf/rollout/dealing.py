"""Dynamic sampling: groups whose rewards are all equal teach nothing, and others are dealt in their place."""

import numpy as np

from lit_rlhf.rollout.play import Play


def equal_groups(played: Play, group_size: int) -> np.ndarray:
    """(groups,) bool: whether all completions of a prompt have the same reward, as it came, before any shaping."""
    rewards = np.array([episode.reward for episode in played.episodes]).reshape(-1, group_size)
    return np.asarray((rewards == rewards[:, :1]).all(1))


def topped_up(played: Play, more: Play, group_size: int) -> Play:
    """As many groups as were played, those of unequal rewards first, in the order they were dealt in.

    Args:
        played: whole groups.
        more: likewise, dealt after them.
        group_size: episodes in a row that answer one prompt.

    Returns:
        A rollout as large as `played`; its `dropped` counts the groups that are left out.
    """
    episodes = played.episodes + more.episodes
    logprobs = played.sampled_logprobs + more.sampled_logprobs
    num_groups = len(played.episodes) // group_size
    order = np.argsort(equal_groups(Play(episodes, logprobs), group_size), kind="stable")[:num_groups]
    kept = (order[:, None] * group_size + np.arange(group_size)).ravel()
    dropped = (played.dropped or 0) + len(more.episodes) // group_size
    return Play([episodes[i] for i in kept], [logprobs[i] for i in kept], dropped=dropped)
