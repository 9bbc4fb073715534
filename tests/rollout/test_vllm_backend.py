"""The vLLM backend against a stand-in that keeps vLLM's documented contract; vLLM itself is not installed here."""

import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lit_rlhf.engine.packing import Example, pack
from lit_rlhf.errors import UserError
from lit_rlhf.models.decoding import filter_logits
from lit_rlhf.models.loading import load_policy_with_tokenizer
from lit_rlhf.rollout.play import GenerationSettings
from lit_rlhf.rollout.vllm_backend import VLLMBackend
from tests.rollout.test_play import make_env
from tests.tiny import EOS, VOCABULARY, save_padded, tiny_policy, tiny_tokenizer
from token_mdp.stop_strings import StopStrings


@dataclass(kw_only=True)
class StandInSamplingParams:
    """`vllm.SamplingParams`: those of its fields that are used here, with its defaults."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0  # all
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    logprobs: int | None = None
    detokenize: bool = True
    logit_bias: dict[int, float] | None = None  # added to the logits before all else; the constructor does not clamp it


class StandInLLM:
    """`vllm.LLM` as of 0.33: prompts of token ids in, token ids with log-probs out; weights reloaded from a folder."""

    def __init__(self, model, *, skip_tokenizer_init, gpu_memory_utilization, logprobs_mode, dtype):
        assert skip_tokenizer_init
        assert logprobs_mode == "processed_logprobs"
        assert 0 < gpu_memory_utilization < 1
        self.dtype = dtype
        self.model = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
        self.stale, self.calls = False, 0

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        return [getattr(self, "worker_" + method)(*args, **(kwargs or {}))]

    def worker_reload_weights(self, weights_iterator=None, weights_path=None, is_checkpoint_format=True):
        assert weights_iterator is None and is_checkpoint_format
        path = Path(weights_path)
        assert path.is_absolute()  # workers are processes of their own
        weights = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
        self.model.load_state_dict(weights, strict=False)
        self.model.tie_weights()
        self.stale = True

    def reset_prefix_cache(self):
        self.stale = False

    @torch.no_grad()
    def generate(self, prompts, sampling_params, use_tqdm):
        assert not self.stale
        self.calls += 1
        self.asked = sampling_params
        return [self.complete(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]

    def complete(self, ids, settings):
        assert not settings.detokenize  # there is no tokenizer
        assert settings.ignore_eos or self.model.generation_config.eos_token_id is None
        generator, tokens, logprobs = torch.Generator().manual_seed(settings.seed), [], []
        while len(tokens) < settings.max_tokens:
            logits = self.model(torch.tensor([ids + tokens])).logits[0, -1]
            for token, bias in (settings.logit_bias or {}).items():
                logits[token] += bias
            logits = logits / settings.temperature
            kept = filter_logits(logits[None], settings.top_k or None, settings.top_p, settings.min_p)[0]
            distribution = torch.log_softmax(kept, -1)
            token = int(torch.multinomial(distribution.exp(), 1, generator=generator))
            tokens.append(token)
            if settings.logprobs is not None:
                logprobs.append({token: types.SimpleNamespace(logprob=distribution[token].item())})
            if token in settings.stop_token_ids:
                break
        return types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tokens, logprobs=logprobs)])


@pytest.fixture
def vllm(monkeypatch):
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = StandInLLM, StandInSamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)


def logprobs_of(policy, played, temperature):
    batch = pack([Example(e.prompt_ids, (e.response_ids,)) for e in played.episodes])
    return policy(batch, temperature)[0].detach()


def test_episodes_and_logprobs_are_those_of_the_policys_present_weights(vllm, tmp_path):
    policy, backend, env = tiny_policy(), VLLMBackend(exchange=str(tmp_path)), make_env(num_envs=6)
    settings = GenerationSettings(temperature=0.8)
    for iteration in range(2):
        played = backend.play(policy, env, settings, 11, env_seed=0 if iteration == 0 else None)
        assert sorted(episode.prompt_index for episode in played.episodes) == list(range(11))
        torch.testing.assert_close(
            torch.from_numpy(np.concatenate(played.sampled_logprobs)),
            logprobs_of(policy, played, 0.8),
            rtol=1e-4,
            atol=1e-4,
        )
        with torch.no_grad():  # an optimiser's step
            for parameter in policy.parameters():
                parameter.mul_(0.9)
    assert list(tmp_path.iterdir()) == []  # no weights are left behind


def test_ids_without_a_token_are_never_written_and_count_in_no_logprob(vllm, tmp_path):
    policy, _ = load_policy_with_tokenizer(save_padded(tmp_path / "model", rows=VOCABULARY))
    played = VLLMBackend().play(policy, make_env(num_envs=11), GenerationSettings(), 11, env_seed=0)
    assert 20 not in np.concatenate([episode.response_ids for episode in played.episodes])
    sampled = torch.from_numpy(np.concatenate(played.sampled_logprobs))
    torch.testing.assert_close(sampled, logprobs_of(policy, played, 1.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixed", [False, True])
def test_the_engine_computes_in_the_dtype_of_the_training(vllm, mixed):
    backend = VLLMBackend()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        backend.play(tiny_policy(), make_env(), GenerationSettings(), 4, env_seed=0)
    assert backend.engine.dtype == ("bfloat16" if mixed else "float32")


def test_prompts_of_all_slots_are_written_in_one_call(vllm):
    backend = VLLMBackend()
    backend.play(tiny_policy(), make_env(num_envs=11), GenerationSettings(), 11, env_seed=0)
    assert backend.engine.calls == 1


def test_every_setting_of_the_sampling_reaches_the_engine(vllm):
    backend = VLLMBackend()
    settings = GenerationSettings(temperature=0.8, top_k=9, top_p=0.9, min_p=0.05, seed=3)
    backend.play(tiny_policy(), make_env(num_envs=4), settings, 4, env_seed=0)
    for asked in backend.engine.asked:
        assert (asked.temperature, asked.top_k, asked.top_p, asked.min_p) == (0.8, 9, 0.9, 0.05)
        assert (asked.max_tokens, asked.stop_token_ids) == (10, sorted({EOS, 7}))
    assert len({asked.seed for asked in backend.engine.asked}) == 4


@pytest.mark.parametrize("num_envs", [2, 11])
def test_a_response_does_not_depend_on_the_slots(vllm, num_envs):
    played = VLLMBackend().play(tiny_policy(), make_env(num_envs), GenerationSettings(seed=3), 11, env_seed=0)
    again = VLLMBackend().play(tiny_policy(), make_env(4), GenerationSettings(seed=3), 11, env_seed=0)
    assert [e.response_ids.tolist() for e in played.episodes] == [e.response_ids.tolist() for e in again.episodes]


def test_without_vllm_the_user_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"pip install '\.\[vllm\]' in a checkout"):
        VLLMBackend().play(tiny_policy(), make_env(), GenerationSettings(), 4, env_seed=0)


def test_a_share_of_memory_that_leaves_none_to_training_is_refused():
    with pytest.raises(UserError, match=r"gpu_memory_utilization \(1.0\)"):
        VLLMBackend(gpu_memory_utilization=1.0)


def test_what_the_engine_writes_behind_a_stop_string_is_no_part_of_the_episode(vllm):
    free = VLLMBackend().play(tiny_policy(), make_env(), GenerationSettings(), 11, env_seed=0)
    stop = int(free.episodes[0].response_ids[1])
    env = make_env()
    env.task.stop_strings = StopStrings(f"w{stop}", tiny_tokenizer())
    policy = tiny_policy()
    played = VLLMBackend().play(policy, env, GenerationSettings(), 11, env_seed=0)
    lengths = [len(episode.response_ids) for episode in played.episodes]
    assert lengths[0] <= 2 and [len(logprobs) for logprobs in played.sampled_logprobs] == lengths
    sampled = torch.from_numpy(np.concatenate(played.sampled_logprobs))
    torch.testing.assert_close(sampled, logprobs_of(policy, played, 1.0), rtol=1e-4, atol=1e-4)
