"""Rollouts by vLLM, in the process of the Trainer: the extra `vllm`.

Written against the interface of vLLM 0.33 (https://docs.vllm.ai/en/v0.33.0/): `LLM.generate` on token ids, and
`LLM.collective_rpc` of the workers' `reload_weights`, which reads a folder of safetensors between two rollouts. Tested
against a stand-in that keeps that contract; vLLM itself, which needs CUDA, could not be run where this was written.
"""

import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from lit_rlhf.engine.linear_head import autocast_dtype
from lit_rlhf.engine.sharding import full_state_dict, is_sharded
from lit_rlhf.errors import UserError, require_types
from lit_rlhf.models.policy import Policy, merged_copy
from lit_rlhf.rollout.play import GenerationSettings, Play, RolloutBackend
from token_mdp import TokenVectorEnv


class VLLMBackend(RolloutBackend):
    """Plays episodes with vLLM's engine on this rank's device.

    The environment deals prompts and ends episodes as ever; vLLM writes whole responses, which are then played token by
    token. Responses of all slots are written in one call: set `num_slots` to the episodes of a rank.

    Args:
        gpu_memory_utilization: share of the device's memory that vLLM may take; the rest is the training's.
        exchange: folder through which the weights go, best in memory; null = /dev/shm, or a temporary one on disk.
        engine_args: further arguments of `vllm.LLM`.
    """

    def __init__(
        self,
        gpu_memory_utilization: float = 0.3,
        exchange: str | None = None,
        engine_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(cuda_graphs=False)
        require_types(VLLMBackend.__init__, locals())
        if not 0 < gpu_memory_utilization < 1:
            raise UserError(f"gpu_memory_utilization ({gpu_memory_utilization}) must lie between 0 and 1")
        self.gpu_memory_utilization = gpu_memory_utilization
        self.exchange = exchange
        self.engine_args = engine_args or {}
        self.engine: Any = None
        self.vllm: Any = None

    def play(
        self,
        policy: Policy,
        env: TokenVectorEnv,
        settings: GenerationSettings,
        num_episodes: int,
        stream: int = 0,
        env_seed: int | None = None,
    ) -> Play:
        """Play `num_episodes` episodes with the policy's present weights."""
        if is_sharded(policy):
            raise UserError(
                "the vLLM backend needs the whole policy on each device; use the default backend with FSDP2"
            )
        self.synchronise(policy)
        observation: Any
        observation, info = env.reset(seed=env_seed, options={"max_episodes": num_episodes})
        responses: dict[int, np.ndarray] = {}  # by episode
        logprobs_of: dict[int, np.ndarray] = {}
        while (active := info["active"]).any():
            slots = np.flatnonzero(active)
            ids = info["episode_id"].copy()
            fresh = [slot for slot in slots.tolist() if int(ids[slot]) not in responses]
            if fresh:
                prompts = [observation["input_ids"][s, : int(observation["length"][s, 0])].tolist() for s in fresh]
                written = self.write(policy, prompts, [int(ids[s]) for s in fresh], env, settings, stream)
                for slot, (tokens, logprobs) in zip(fresh, written, strict=True):
                    responses[int(ids[slot])], logprobs_of[int(ids[slot])] = tokens, logprobs
            steps = observation["length"][:, 0] - observation["prompt_length"][:, 0]
            actions = np.zeros(env.num_envs, dtype=np.int64)
            actions[slots] = [responses[int(ids[slot])][steps[slot]] for slot in slots]
            observation, _, _, _, info = env.step(actions)
        episodes = env.pop_episodes()
        for episode in episodes:
            length = len(episode.response_ids)
            if env.task.stop_strings.texts:  # which the engine, without a tokenizer, writes on behind
                logprobs_of[episode.episode_id] = logprobs_of[episode.episode_id][:length]
            elif length != len(responses[episode.episode_id]):
                raise RuntimeError(
                    f"vLLM wrote {len(responses[episode.episode_id])} tokens for episode {episode.episode_id}, the "
                    f"environment ended it after {len(episode.response_ids)}: their stop tokens or limits differ"
                )
        return Play(episodes, [logprobs_of[episode.episode_id] for episode in episodes])

    def write(
        self,
        policy: Policy,
        prompts: list[list[int]],
        episode_ids: list[int],
        env: TokenVectorEnv,
        settings: GenerationSettings,
        stream: int,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Whole responses with the log-probs under the distribution sampled from, (T,) each."""
        unused = [] if policy.unused_ids is None else policy.unused_ids.tolist()
        parameters = [
            self.vllm.SamplingParams(
                max_tokens=env.task.max_new_tokens,
                temperature=settings.temperature,
                top_k=0 if settings.top_k is None else settings.top_k,
                top_p=settings.top_p,
                min_p=settings.min_p,
                # One seed per episode: a response does not depend on slots or neighbours.
                seed=int(np.random.SeedSequence([settings.seed, stream, episode]).generate_state(1)[0]),
                stop_token_ids=np.flatnonzero(env.task.is_stop).tolist(),
                ignore_eos=True,  # the environment's stop tokens and no others
                logprobs=0,  # of the token taken alone
                detokenize=False,
                # Not `allowed_token_ids`, of which its newer runner takes 1024 at most.
                logit_bias=dict.fromkeys(unused, -math.inf) or None,
            )
            for episode in episode_ids
        ]
        outputs = self.engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)
        written = []
        for output in outputs:
            tokens = np.array(output.outputs[0].token_ids, dtype=np.int64)
            taken = [
                by_token[token].logprob for token, by_token in zip(tokens, output.outputs[0].logprobs, strict=True)
            ]
            written.append((tokens, np.array(taken, dtype=np.float32)))
        return written

    def synchronise(self, policy: Policy) -> None:
        """Start the engine with the policy's weights, or hand it the present ones."""
        folder = self.save(policy)
        try:
            if self.engine is None:
                self.start(folder, policy)
            else:
                self.engine.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
                self.engine.reset_prefix_cache()  # its keys are of the old weights
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def start(self, folder: Path, policy: Policy) -> None:
        """Load vLLM and the model, which computes in the dtype that the policy computes in.

        Raises:
            UserError: vLLM is not installed.
        """
        try:
            import vllm
        except ImportError as error:
            raise UserError(
                f"the vLLM backend needs vLLM ({error}); pip install '.[vllm]' in a checkout of lit-rlhf"
            ) from error
        self.vllm = vllm
        device = policy.model.device.type
        settings = {
            "skip_tokenizer_init": True,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "logprobs_mode": "processed_logprobs",  # after temperature and filters: of the distribution sampled from
            "dtype": str(autocast_dtype(device) or policy.model.dtype).removeprefix("torch."),
        }
        self.engine = vllm.LLM(model=str(folder), **settings | self.engine_args)

    def save(self, policy: Policy) -> Path:
        """The policy's weights as a Hugging Face folder of safetensors, for the engine to read."""
        memory = Path("/dev/shm")
        parent = self.exchange or (str(memory) if memory.is_dir() else None)
        folder = Path(tempfile.mkdtemp(prefix="lit-rlhf-weights-", dir=parent))
        model = policy.model if policy.adapters is None else merged_copy(policy).model
        model.save_pretrained(folder, state_dict=full_state_dict(model))
        return folder
