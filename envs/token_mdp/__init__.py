"""Token generation as a Markov decision process, for any Gymnasium agent.

Importing this package registers `LitRLHF/Token-v0` (Dict observation) and `LitRLHF/TokenFlat-v0` (one Box).

    >>> import gymnasium, token_mdp
    >>> env = gymnasium.make("LitRLHF/Token-v0", render_mode="ansi")
    >>> observation, info = env.reset(seed=0, options={"prompt_index": 6})
    >>> for token in (1, 3, 0):
    ...     observation, reward, terminated, truncated, info = env.step(token)
    >>> print(env.render())
    prompt   │ a c →
    response │ a c <end>
    reward   │ 1 (stop)
"""

from token_mdp.env import TokenEnv
from token_mdp.episodes import Episode, FinishReason
from token_mdp.prompts import PromptQueue
from token_mdp.registration import register_all
from token_mdp.rewards import RewardError, Shared
from token_mdp.vector_env import TokenVectorEnv

__all__ = ["Episode", "FinishReason", "PromptQueue", "RewardError", "Shared", "TokenEnv", "TokenVectorEnv"]

register_all()
