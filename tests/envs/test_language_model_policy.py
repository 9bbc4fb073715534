"""The language model policy of docs/agents.md: short, exact, and it learns."""

import re
import tempfile
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from token_tasks import toy_score

pytest.importorskip("stable_baselines3", reason="needs the extra `agents`")
pytest.importorskip("lit_rlhf", reason="needs lit_rlhf beside token_mdp")

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from token_mdp.sb3 import SB3VecEnv

PAGE = (Path(__file__).parents[2] / "docs" / "agents.md").read_text()
TINY = LlamaConfig(vocab_size=6, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
DROPPING = GPT2Config(vocab_size=6, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)  # 10 % dropout


def policy_of_the_docs():
    """The names that the page's block defines, and its lines; the training at its end is left out."""
    section = PAGE.split("## A language model in Stable-Baselines3")[1]
    text = re.search(r"```python\n(.*?)```", section, re.S).group(1).split("\n\n\n# Stands for")[0]
    names = {"__name__": "example"}
    exec(compile(text, "docs/agents.md", "exec"), names)
    return names, text


class Checked(BaseCallback):
    """Compares the log-probs and values of each rollout with transformers' own forward, row by row."""

    def __init__(self):
        super().__init__()
        self.compared = 0

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        buffer, model = self.model.rollout_buffer, self.model.policy.policy.model
        implementation = model.config._attn_implementation
        model.set_attn_implementation("eager")
        for step in range(buffer.buffer_size):
            for slot in range(buffer.n_envs):
                length = int(buffer.observations["length"][step, slot, 0])
                ids = torch.from_numpy(buffer.observations["input_ids"][step, slot, :length]).to(model.device).long()
                with torch.no_grad():
                    outputs = model(ids[None], use_cache=False).logits[0, -1]
                logprobs = torch.log_softmax(outputs[:-1], dim=-1)
                action = int(buffer.actions[step, slot, 0])
                torch.testing.assert_close(
                    logprobs[action].item(), buffer.log_probs[step, slot].item(), rtol=0, atol=1e-5
                )
                torch.testing.assert_close(outputs[-1].item(), buffer.values[step, slot].item(), rtol=0, atol=1e-5)
                self.compared += 1
        model.set_attn_implementation(implementation)


def make(num_envs, n_steps, mode="terminate", of=lambda: LlamaForCausalLM(TINY), **arguments):
    env = SB3VecEnv(gymnasium.make_vec("LitRLHF/Token-v0", num_envs=num_envs, limit=mode))
    names, _ = policy_of_the_docs()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        of().save_pretrained(folder)
        return PPO(
            names["LanguageModelPolicy"],
            env,
            policy_kwargs={"model_name": folder},
            n_steps=n_steps,
            gamma=1.0,
            seed=0,
            **{"device": "cpu", "learning_rate": 2e-3} | arguments,
        )


def test_the_policy_fits_on_a_page():
    _, text = policy_of_the_docs()
    policy = text[text.index("class LogitsAndValue") :]
    assert len(policy.strip().splitlines()) <= 60


def test_new_weights_in_the_middle_of_a_rollout_empty_the_cache():
    model = make(num_envs=3, n_steps=10, batch_size=30)
    observations = model.env.reset()
    model.policy.set_training_mode(False)
    model.predict(observations)
    decoder = model.policy.decoder
    other = make(num_envs=3, n_steps=10, batch_size=30)
    torch.nn.init.normal_(other.policy.policy.model.get_input_embeddings().weight)
    observations, *_ = model.env.step(np.array([1, 2, 3]))
    model.predict(observations)
    assert model.policy.decoder is decoder  # the cache goes on
    model.set_parameters(other.get_parameters())
    other.policy.set_training_mode(False)
    observations, *_ = model.env.step(np.array([1, 2, 3]))  # a token more than the cache holds
    given = {key: torch.as_tensor(value) for key, value in observations.items()}
    torch.testing.assert_close(model.policy.predict_values(given), other.policy.predict_values(given))


def test_the_saved_model_is_the_language_model_that_was_trained(tmp_path):
    model = make(num_envs=3, n_steps=10, batch_size=30, n_epochs=1)
    model.learn(30)
    model.policy.save_pretrained(tmp_path)
    saved, report = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    head = model.policy.policy.model.get_output_embeddings()
    assert torch.equal(saved.lm_head.weight, head.head.weight) and hasattr(head, "value")
    assert saved.generate(torch.tensor([[1, 3, 5]]), max_new_tokens=2).shape[1] > 3
    model.learn(30)  # goes on with its critic


def test_a_head_that_is_not_as_wide_as_the_vocabulary_is_refused():
    wide = LlamaConfig(**TINY.to_dict() | {"vocab_size": 9})
    with pytest.raises(AssertionError, match="9 logits for 6 tokens"):
        make(num_envs=1, n_steps=10, batch_size=10, of=lambda: LlamaForCausalLM(wide))


@pytest.mark.plays(
    "stable_baselines3",
    "PPO with a language model: rollout log-probs equal the full forward's",
    "native through `SB3VecEnv`",
)
def test_rollout_logprobs_equal_the_full_forward_through_refills_and_updates():
    model = make(num_envs=3, n_steps=10, batch_size=15, n_epochs=1)
    checked = Checked()
    model.learn(90, callback=checked)  # three rollouts with two updates between them
    assert checked.compared == 90


def test_the_cache_stays_exact_where_single_final_observations_come_in_between():
    model = make(num_envs=3, n_steps=10, batch_size=15, n_epochs=1, mode="truncate")
    checked = Checked()
    model.learn(60, callback=checked)
    assert checked.compared == 60


def test_keys_of_old_weights_are_forgotten():
    policy = make(num_envs=1, n_steps=10, batch_size=10).policy
    observation = {"input_ids": torch.tensor([[1, 2, 5, 3, 0, 0, 0]]), "length": torch.tensor([[4]])}
    policy.set_training_mode(False)
    policy.predict_values(observation)
    policy.set_training_mode(True)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
        observation["input_ids"][0, 4], observation["length"][0] = 1, 5  # one token more: a cache would decode it
        expected = policy.predict_values(observation)
    policy.set_training_mode(False)
    torch.testing.assert_close(policy.predict_values(observation), expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "of",
    [
        lambda: LlamaForCausalLM(TINY),
        lambda: LlamaForCausalLM(TINY).bfloat16(),
        lambda: GPT2LMHeadModel(DROPPING),
    ],
    ids=["float32", "bfloat16", "dropout"],
)
def test_training_starts_from_a_ratio_of_one(of, device):
    model = make(num_envs=3, n_steps=10, batch_size=30, n_epochs=1, of=of, device=device)
    checked = Checked()
    model.learn(30, callback=checked)
    assert checked.compared == 30
    assert abs(model.logger.name_to_value["train/approx_kl"]) < 1e-6


@pytest.mark.plays("stable_baselines3", "PPO teaches a language model the toy task", "native through `SB3VecEnv`")
@pytest.mark.slow
def test_a_language_model_learns_the_toy_task():
    rate = {"learning_rate": lambda left: 3e-3 * left}  # kept constant, it ends anywhere between 0.7 and 1
    model = make(num_envs=64, n_steps=16, batch_size=256, n_epochs=4, ent_coef=0.01, **rate)
    model.learn(1024 * 30)
    assert toy_score(lambda observations: model.predict(observations, deterministic=True)[0]) >= 0.9
