import pytest
import torch

from lit_rlhf.oracle import Oracle, TablePolicy, TokenTree, objective
from tests.oracle.small_trees import random_policy, random_reward


class TestTablePolicy:
    tree = TokenTree(4, [0, 2], 3)
    prompts = (torch.tensor([1, 2]), torch.tensor([3]))

    def test_it_starts_as_the_policy_it_is_given(self):
        reference = random_policy(4, 0)
        policy = TablePolicy(self.tree, self.prompts, reference)
        for prompt in self.prompts:
            for level in range(3):
                prefixes = self.tree.prefixes(level)
                assert torch.allclose(policy.logprob_fn(prompt, prefixes), reference(prompt, prefixes))

    def test_an_unknown_prompt_is_refused_with_those_it_has(self):
        with pytest.raises(ValueError, match=r"no prompt \[3, 3\], only \[\[1, 2\], \[3\]\]"):
            TablePolicy(self.tree, self.prompts).logprob_fn(torch.tensor([3, 3]), torch.empty(1, 0, dtype=torch.int64))

    def test_the_states_of_a_response_are_those_of_its_prefixes(self):
        policy = TablePolicy(self.tree, self.prompts, random_policy(4, 0))
        for number, prompt in enumerate(self.prompts):
            responses = self.tree.completions
            states = policy.states(torch.full((len(responses),), number), responses)
            steps = policy(states).gather(-1, responses[..., None])[..., 0]
            mask = torch.arange(3) < self.tree.lengths[:, None]
            expected = self.tree.completion_logprobs(self.tree.tabulate(random_policy(4, 0), prompt))
            assert torch.allclose((steps * mask).sum(1), expected)

    def test_a_moved_table_is_another_one_as_far_away_as_asked(self):
        policy = TablePolicy(self.tree, self.prompts, random_policy(4, 0))
        moved = policy.moved(0.1, seed=3)
        assert (moved.logits - policy.logits).std().item() == pytest.approx(0.1, rel=0.2)
        assert torch.equal(moved.logits, policy.moved(0.1, seed=3).logits)
        assert not torch.equal(moved.logits, policy.moved(0.1, seed=4).logits)

    def test_no_state_is_beyond_the_longest_response(self):
        policy = TablePolicy(self.tree, self.prompts)
        with pytest.raises(ValueError, match="responses of 4 tokens; expected at most 3"):
            policy.states(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64))

    def test_without_a_start_it_is_uniform_and_its_gradient_is_exact(self):
        policy = TablePolicy(self.tree, self.prompts)
        assert torch.allclose(policy(torch.arange(4)), torch.tensor(0.25, dtype=torch.float64).log())
        oracle = Oracle(self.tree, self.prompts, policy.logprob_fn, random_reward, beta=0.3)
        objective(oracle.logprobs(policy.logprob_fn), oracle.ref_logprobs, oracle.rewards, 0.3).mean().backward()
        assert policy.logits.grad.abs().max() > 0
