"""What the registered ids make: the embedded toy task without arguments, the caller's own task with them."""

from __future__ import annotations

from typing import Any

from gymnasium.envs.registration import register, registry

from token_mdp.env import TokenEnv
from token_mdp.toy import toy_task
from token_mdp.vector_env import TokenVectorEnv

# id → registered keywords; strings only, since a live object would be deep-copied once per wrapper
IDS = {"LitRLHF/Token-v0": {}, "LitRLHF/TokenFlat-v0": {"observation": "flat"}}


def make_token_env(**arguments: Any) -> TokenEnv:
    """`TokenEnv(**arguments)`; without `prompts`, the toy task with the arguments given changed in it."""
    return TokenEnv(**_with_toy_task(arguments))


def make_token_vector_env(num_envs: int, **arguments: Any) -> TokenVectorEnv:
    """`TokenVectorEnv(num_envs=num_envs, **arguments)`; without `prompts`, the toy task as in `make_token_env`."""
    return TokenVectorEnv(num_envs=num_envs, **_with_toy_task(arguments))


# `gymnasium.make` reads the render modes from the entry point.
make_token_env.metadata = TokenEnv.metadata  # type: ignore[attr-defined]
make_token_vector_env.metadata = TokenVectorEnv.metadata  # type: ignore[attr-defined]


def register_all() -> None:
    """Register the ids; once, since Gymnasium warns about the second time."""
    for env_id, keywords in IDS.items():
        if env_id not in registry:
            register(
                env_id,
                entry_point="token_mdp.registration:make_token_env",
                vector_entry_point="token_mdp.registration:make_token_vector_env",
                kwargs=dict(keywords),
            )


def _with_toy_task(arguments: dict[str, Any]) -> dict[str, Any]:
    return arguments if "prompts" in arguments else toy_task() | arguments
