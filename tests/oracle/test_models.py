import itertools
import math
import re

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lit_rlhf.engine.attention import IMPLEMENTATION
from lit_rlhf.models.policy import Policy
from lit_rlhf.oracle import Oracle, TokenTree, causal_lm, objective
from tests.oracle.small_trees import PROMPT, random_reward, tiny_llama
from tests.tiny import plain_logits, tiny_model


def tiny_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=5, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=None, eos_token_id=None
    )
    return GPT2LMHeadModel(config)


class TestCausalLM:
    @pytest.mark.parametrize("make_model", [tiny_llama, tiny_gpt2])
    def test_it_agrees_with_one_forward_per_completion(self, make_model):
        model, tree = make_model(), TokenTree(5, [0], 3)
        logprobs = tree.completion_logprobs(tree.tabulate(causal_lm(model), PROMPT))
        assert logprobs.exp().sum().item() == pytest.approx(1)
        model.eval()
        for row in range(0, tree.num_completions, 7):
            y = tree.completions[row, : tree.lengths[row]]
            with torch.no_grad():
                logits = model(input_ids=torch.cat([PROMPT, y])[None]).logits[0].double()
            steps = torch.log_softmax(logits, -1)[len(PROMPT) - 1 : -1]
            assert logprobs[row].item() == pytest.approx(steps.gather(1, y[:, None]).sum().item(), abs=1e-5)

    def test_chunks_change_nothing(self):
        model, prefixes = tiny_llama(), torch.tensor(list(itertools.product(range(5), repeat=2)))
        whole = causal_lm(model)(PROMPT, prefixes)
        assert torch.allclose(causal_lm(model, max_tokens=12)(PROMPT, prefixes), whole, atol=1e-6)

    def test_dropout_is_off_during_the_call_and_the_mode_is_given_back(self):
        model = tiny_gpt2().train()
        model.transformer.h[0].eval()
        prefixes = torch.tensor([[1], [2]])
        assert torch.equal(causal_lm(model)(PROMPT, prefixes), causal_lm(model)(PROMPT, prefixes))
        assert model.training and model.transformer.h[1].training and not model.transformer.h[0].training

    def test_a_model_loaded_for_packed_batches_gives_the_same_and_stays_packed(self):
        prefixes = torch.tensor([[1, 2], [3, 4]])
        packed = tiny_llama(attn_implementation=IMPLEMENTATION)
        assert torch.allclose(causal_lm(packed)(PROMPT, prefixes), causal_lm(tiny_llama())(PROMPT, prefixes), atol=1e-6)
        assert packed.config._attn_implementation == IMPLEMENTATION

    def test_a_packed_gemma_2_keeps_its_soft_caps(self):
        model, prefixes = tiny_model("gemma2"), torch.tensor([[5, 6, 7], [8, 9, 10]])
        rows = torch.cat([PROMPT.expand(2, -1), prefixes], dim=1)
        expected = [torch.log_softmax(plain_logits(model, row)[-1].double(), -1) for row in rows]
        assert torch.allclose(causal_lm(model)(PROMPT, prefixes), torch.stack(expected), atol=1e-6)
        assert model.config._attn_implementation == IMPLEMENTATION

    @pytest.mark.parametrize("fails", ["forward", "set_attn_implementation"])
    def test_mode_and_attention_are_given_back_whatever_fails(self, fails, monkeypatch):
        model = tiny_model("gemma2").train()
        own = getattr(model, fails)

        def broken(*args, **kwargs):
            if args != (IMPLEMENTATION,):
                raise RuntimeError("broken")
            return own(*args, **kwargs)

        monkeypatch.setattr(model, fails, broken)
        with pytest.raises(RuntimeError, match="broken"):
            causal_lm(model)(PROMPT, torch.tensor([[5]]))
        assert model.config._attn_implementation == IMPLEMENTATION
        assert all(module.training for module in model.modules())

    def test_temperature_divides_the_logits(self):
        model, prefixes = tiny_llama(), torch.tensor([[1]])
        cold, warm = causal_lm(model, temperature=0.5), causal_lm(model)
        expected = torch.log_softmax(2 * warm(PROMPT, prefixes), -1)
        assert torch.allclose(cold(PROMPT, prefixes), expected)

    @pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
    def test_a_temperature_that_gives_no_policy_is_refused_by_name(self, temperature):
        with pytest.raises(ValueError, match=rf"temperature \({temperature}\) must be more than 0"):
            causal_lm(tiny_llama(), temperature=temperature)

    def test_what_is_no_model_is_refused_with_where_the_model_is(self):
        with pytest.raises(ValueError, match=r"not a Policy; of a DPO or PPO module, policy.model"):
            causal_lm(Policy(tiny_llama()))

    @pytest.mark.parametrize("prompt", [[], [5], [1, -1]])
    def test_a_prompt_that_the_model_cannot_read_is_refused(self, prompt):
        with pytest.raises(ValueError, match=rf"one or more token ids, 0 to 4; got {re.escape(str(prompt))}"):
            Oracle(TokenTree(5, [0], 2), [prompt], causal_lm(tiny_llama()), random_reward, 0.3)

    def test_the_exact_gradient_reaches_the_weights_only_if_asked_for(self):
        model, tree = tiny_llama(), TokenTree(5, [0], 2)
        rewards = random_reward(PROMPT, tree.completions, tree.lengths)
        assert not tree.tabulate(causal_lm(model), PROMPT)[0].requires_grad
        logprobs = tree.completion_logprobs(tree.tabulate(causal_lm(model, requires_grad=True), PROMPT))
        objective(logprobs, logprobs.detach(), rewards, 0.1).backward()
        assert model.lm_head.weight.grad.abs().max() > 0
