"""A Gymnasium vector env as Stable-Baselines3 wants it; the one file here that needs `stable_baselines3`.

    from token_mdp.sb3 import SB3VecEnv
    model = PPO("MultiInputPolicy", SB3VecEnv(gymnasium.make_vec("LitRLHF/Token-v0", num_envs=64)))

Also for sb3-contrib: MaskablePPO finds `action_masks`, RecurrentPPO needs nothing more.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

NO_PARKING = "must be None: Stable-Baselines3 would train on slots that are parked"


class SB3VecEnv(VecEnv):
    """`env` with the interface of Stable-Baselines3: what a `DummyVecEnv` of single envs returns, at native speed.

    Args:
        env: a vector env in the autoreset mode "SameStep", such as `TokenVectorEnv`, perhaps in wrappers.

    Raises:
        ValueError: `env` is set up in a way that would hand wrong transitions to the agent, silently.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        _check_setup(env)
        self.env = env
        self._actions = np.empty(0, dtype=np.int64)
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> VecEnvObs:
        """First observations; the seed and the options set before are those of the whole vector env, and used once."""
        _check_setup(self.env)  # attributes may have been set since
        observations, infos = self.env.reset(seed=self._seeds[0], options=self._options[0] or None)
        self.reset_infos = _rows(infos, self.num_envs)
        self._reset_seeds()
        self._reset_options()
        return observations

    def set_options(self, options: list[dict[str, Any]] | dict[str, Any] | None = None) -> None:
        """Options of the next reset, in the form that the vector env takes."""
        if isinstance(options, list):
            raise ValueError("options must be one dict for all slots, as {'prompt_index': (B,) indices}; got a list")
        if "max_episodes" in (options or {}):
            raise ValueError(f"max_episodes ({options}) {NO_PARKING}")
        super().set_options(options)

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Observations, float32 rewards, dones and one info per slot, with `terminal_observation` where it ended."""
        observations, rewards, terminated, truncated, infos = self.env.step(self._actions)
        rows = _rows(infos, self.num_envs)
        dones = terminated | truncated
        if dones.any():
            ends = _rows(infos["final_info"], self.num_envs)
            for slot in np.flatnonzero(dones).tolist():
                # Gymnasium's RecordEpisodeStatistics puts what ended beside the infos of the refill.
                ended = {key: rows[slot].pop(key) for key in ("episode",) if key in rows[slot]}
                self.reset_infos[slot] = rows[slot]
                rows[slot] = ends[slot] | ended | {"terminal_observation": infos["final_obs"][slot]}
        for row, cut in zip(rows, (truncated & ~terminated).tolist(), strict=True):
            row["TimeLimit.truncated"] = cut
        return observations, rewards.astype(np.float32), dones, rows

    def close(self) -> None:
        """Close the vector env."""
        self.env.close()

    def get_images(self) -> list[np.ndarray | None]:
        """One picture per slot, of an env made with render_mode="rgb_array"; else None for each, and a warning."""
        if self.render_mode != "rgb_array":
            warnings.warn(
                f"there are no pictures with render_mode={self.render_mode!r}; make the env with 'rgb_array'",
                stacklevel=2,
            )
            return [None] * self.num_envs
        pictures: Any = self.env.render()
        return list(pictures)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The attribute of the vector env or of a wrapper around it, once per slot."""
        value = getattr(self._holder(attr_name), attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute where `get_attr` finds it, or on the vector env; all slots share it.

        Raises:
            ValueError: as the constructor would with this value; the attribute stays what it was.
        """
        if indices is not None:
            raise ValueError(f"the slots share {attr_name!r}; it cannot be set for slots {indices} only")
        holder = self._holder(attr_name)
        before = getattr(holder, attr_name, None)
        setattr(holder, attr_name, value)
        try:
            _check_setup(self.env)
        except ValueError:
            setattr(holder, attr_name, before)
            raise

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of the vector env that answers for each slot, as `action_masks`; the answers of `indices`.

        Raises:
            ValueError: it answers for all slots together, as `observe` and `state_dict` do; call it on `env` itself.
        """
        if method_name in ("reset", "step"):  # before they change anything
            raise ValueError(f"{method_name}() is for all {self.num_envs} slots together; call it on this adapter")
        answers = getattr(self._holder(method_name), method_name)(*method_args, **method_kwargs)
        if answers is not None and not _one_per_slot(answers, self.num_envs):
            raise ValueError(
                f"{method_name}() must answer with one value for each of {self.num_envs} slots, got "
                f"{type(answers).__name__}; call it on the vector env itself"
            )
        return [None if answers is None else answers[index] for index in self._get_indices(indices)]

    def _holder(self, name: str) -> Any:
        layer: Any = self.env  # Gymnasium's vector wrappers forward no attributes
        while not hasattr(layer, name) and layer is not self.env.unwrapped:
            layer = layer.env
        return layer

    def env_is_wrapped(self, wrapper_class: type[Any], indices: VecEnvIndices = None) -> list[bool]:
        """False: wrappers of single envs, which this asks for, are never around a slot."""
        return [False for _ in self._get_indices(indices)]


def _one_per_slot(answers: Any, num_envs: int) -> bool:
    """Whether these are B values; (observations, infos), say, are a pair also where B is 2."""
    if not isinstance(answers, np.ndarray | list | tuple) or len(answers) != num_envs:
        return False
    return isinstance(answers, np.ndarray) or not any(isinstance(answer, dict) for answer in answers)


def _rows(infos: dict[str, Any], num_envs: int) -> list[dict[str, Any]]:
    """Infos of a vector env, key by key, as one dict per slot."""
    rows: list[dict[str, Any]] = [{} for _ in range(num_envs)]
    everywhere = np.ones(num_envs, dtype=np.bool_)  # a dict inside of infos may come without masks
    for key, values in infos.items():
        if key.startswith("_") or key in ("final_obs", "final_info"):
            continue
        if isinstance(values, dict):
            values = _rows(values, num_envs)
        for row, value, there in zip(rows, values, infos.get(f"_{key}", everywhere).tolist(), strict=True):
            if there:
                row[key] = value
    return rows


def _check_setup(env: VectorEnv[Any, Any, Any]) -> None:
    """Refuse what Stable-Baselines3 would take without a word and learn nonsense from."""
    if not isinstance(env, VectorEnv):
        raise ValueError(f"env ({env!r:.80}) must be a vector env, as gymnasium.make_vec makes")
    mode = env.metadata.get("autoreset_mode")
    if mode != AutoresetMode.SAME_STEP:
        raise ValueError(f"autoreset_mode ({mode}) must be 'SameStep': Stable-Baselines3 expects the reset in the step")
    base: Any = env.unwrapped
    if not getattr(base, "copy", True):
        raise ValueError("copy (False) must be True: Stable-Baselines3 keeps observations past the next step")
    if getattr(base, "reward_mode", "immediate") != "immediate":
        raise ValueError(f"reward_mode ({base.reward_mode!r}) must be 'immediate': rewards must come with the step")
    if getattr(base, "max_episodes", None) is not None:
        raise ValueError(f"max_episodes ({base.max_episodes}) {NO_PARKING}")
