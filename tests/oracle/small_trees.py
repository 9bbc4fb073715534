"""Trees, policies and rewards that the tests of the oracle share, and the same by slow recursion."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lit_rlhf.oracle import TokenTree

PROMPT = torch.tensor([1, 2])


def random_policy(vocab_size, seed):
    """A table policy that depends on prompt and prefix, through a hash that a loop and a batch compute alike."""
    weights = torch.randn(64, vocab_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def logprob_fn(prompt_ids, prefixes):
        key = torch.full((len(prefixes),), int(prompt_ids.sum()))
        for column in prefixes.T:
            key = (5 * key + column + 1) % 64
        return torch.log_softmax(weights[key], dim=-1)

    return logprob_fn


def random_reward(prompt_ids, completions, lengths):
    return torch.sin(3.0 * completions.double().cumsum(1).sum(1) + lengths + prompt_ids.sum())


class SlowTree:
    """The same by recursion over Python tuples, one completion at a time."""

    def __init__(self, vocab_size, stop_ids, max_new_tokens):
        self.V, self.stops, self.T = vocab_size, set(stop_ids), max_new_tokens

    def ended(self, prefix):
        return len(prefix) == self.T or (len(prefix) > 0 and prefix[-1] in self.stops)

    def completions(self, prefix=()):
        if self.ended(prefix):
            return [prefix]
        return [y for token in range(self.V) for y in self.completions((*prefix, token))]

    def step(self, policy, prefix):
        return policy(PROMPT, torch.tensor([prefix], dtype=torch.int64).view(1, -1))[0].tolist()

    def logprob(self, policy, completion):
        return sum(self.step(policy, completion[:t])[completion[t]] for t in range(len(completion)))

    def optimal_value(self, reference, reward, beta, prefix=()):
        if self.ended(prefix):
            return reward[prefix]
        logprobs = self.step(reference, prefix)
        children = [self.optimal_value(reference, reward, beta, (*prefix, token)) for token in range(self.V)]
        return beta * math.log(sum(math.exp(lp + q / beta) for lp, q in zip(logprobs, children, strict=True)))

    def policy_value(self, policy, reference, reward, beta, prefix=()):
        if self.ended(prefix):
            return reward[prefix]
        total = 0.0
        for token, (lp, ref) in enumerate(zip(self.step(policy, prefix), self.step(reference, prefix), strict=True)):
            child = self.policy_value(policy, reference, reward, beta, (*prefix, token))
            total += math.exp(lp) * (child - beta * (lp - ref))
        return total


def as_tuples(tree):
    return [tuple(row[:n]) for row, n in zip(tree.completions.tolist(), tree.lengths.tolist(), strict=True)]


SHAPES = [(4, [0], 3), (4, [1, 3], 3), (2, [], 4), (3, [0, 1, 2], 2), (5, [4], 1)]
every_shape = pytest.mark.parametrize(("vocab_size", "stop_ids", "max_new_tokens"), SHAPES)


def one_prompt(vocab_size, stop_ids, max_new_tokens):
    tree = TokenTree(vocab_size, stop_ids, max_new_tokens)
    ref_table = tree.tabulate(random_policy(vocab_size, 0), PROMPT)
    table = tree.tabulate(random_policy(vocab_size, 1), PROMPT)
    return tree, ref_table, table, random_reward(PROMPT, tree.completions, tree.lengths)


def tiny_llama(**kwargs):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=5, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, **kwargs).eval()
