"""What the registered ids make: the embedded toy task without arguments, the caller's own task with them."""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from typing import Any

from gymnasium.envs.registration import register, registry

from token_mdp.checks import ArgumentError
from token_mdp.env import TokenEnv
from token_mdp.toy import toy_task
from token_mdp.vector_env import TokenVectorEnv

# id → registered keywords; strings only, since a live object would be deep-copied once per wrapper
IDS = {"LitRLHF/Token-v0": {}, "LitRLHF/TokenFlat-v0": {"observation": "flat"}}


def make_token_env(**arguments: Any) -> TokenEnv:
    """`TokenEnv(**arguments)`; without `prompts`, the toy task with the arguments given changed in it."""
    return TokenEnv(**_checked(TokenEnv, arguments))


def make_token_vector_env(num_envs: int, **arguments: Any) -> TokenVectorEnv:
    """`TokenVectorEnv(num_envs=num_envs, **arguments)`; without `prompts`, the toy task as in `make_token_env`."""
    return TokenVectorEnv(**_checked(TokenVectorEnv, {"num_envs": num_envs} | arguments))


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


def _checked(env: type[TokenEnv | TokenVectorEnv], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with the toy task's in place of missing ones if there are no `prompts`.

    Raises:
        ArgumentError: one is unknown. Python's own TypeError would do, but `gymnasium.make` adds all arguments to its
            text, whole data sets of prompts.
        ValueError: one is missing, or tells of prompts that are not there.
    """
    parameters = inspect.signature(env).parameters
    for name in arguments:
        if name in parameters:
            continue
        hint = "".join(f"; did you mean {near!r}?" for near in get_close_matches(name, parameters, n=1))
        if name in inspect.signature(TokenVectorEnv).parameters:
            hint = "; it is one of gymnasium.make_vec"
        # Python's own words, which TorchRL looks for
        raise ArgumentError(f"{env.__name__} got an unexpected keyword argument {name!r}{hint}")
    if "prompts" not in arguments:
        if foreign := [name for name in ("vocab_size", "stop_token_ids", "columns") if name in arguments]:
            raise ValueError(f"{foreign} without prompts: the embedded toy task has its own; hand in prompts too")
        arguments = toy_task() | arguments
    required = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    if missing := [name for name in required if name not in arguments]:
        raise ValueError(f"{env.__name__} needs {missing} too, for prompts of your own")
    return arguments
