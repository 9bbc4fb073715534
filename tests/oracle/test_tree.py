import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_rlhf.oracle import Oracle, TokenTree
from tests.oracle.small_trees import PROMPT, SlowTree, as_tuples, every_shape, random_policy, random_reward


class CountOperations(TorchDispatchMode):
    """Counts tensor operations while it is entered."""

    operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        return func(*args, **(kwargs or {}))


class TestTokenTree:
    @every_shape
    def test_it_lists_each_completion_once(self, vocab_size, stop_ids, max_new_tokens):
        tree, slow = TokenTree(vocab_size, stop_ids, max_new_tokens), SlowTree(vocab_size, stop_ids, max_new_tokens)
        listed = as_tuples(tree)
        assert len(listed) == tree.num_completions == len(set(listed))
        assert set(listed) == set(slow.completions())

    def test_the_order_by_hand(self):
        # stop token 0, at most two tokens: [0] has ended; 1 and 2 go on
        assert as_tuples(TokenTree(3, [0], 2)) == [(0,), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]

    @every_shape
    def test_index_finds_each_completion(self, vocab_size, stop_ids, max_new_tokens):
        tree = TokenTree(vocab_size, stop_ids, max_new_tokens)
        assert [tree.index(y) for y in as_tuples(tree)] == list(range(tree.num_completions))

    @pytest.mark.parametrize("tokens", [[], [1], [0, 1], [1, 0, 0], [1, 1, 1, 1], [7, 0], [1, 1, 9]])
    def test_index_refuses_what_is_no_completion(self, tokens):
        with pytest.raises(ValueError, match="is no completion"):
            TokenTree(3, [0], 3).index(tokens)

    @every_shape
    def test_probabilities_sum_to_one_and_agree_with_a_slow_recursion(self, vocab_size, stop_ids, max_new_tokens):
        tree, slow = TokenTree(vocab_size, stop_ids, max_new_tokens), SlowTree(vocab_size, stop_ids, max_new_tokens)
        policy = random_policy(vocab_size, seed=0)
        logprobs = tree.completion_logprobs(tree.tabulate(policy, PROMPT))
        assert logprobs.exp().sum().item() == pytest.approx(1)
        assert logprobs.tolist() == pytest.approx([slow.logprob(policy, y) for y in as_tuples(tree)])

    @every_shape
    def test_along_follows_each_completion_through_states_and_actions(self, vocab_size, stop_ids, max_new_tokens):
        tree, slow = TokenTree(vocab_size, stop_ids, max_new_tokens), SlowTree(vocab_size, stop_ids, max_new_tokens)
        policy = random_policy(vocab_size, seed=0)
        table = tree.tabulate(policy, PROMPT)
        actions, states = tree.along(table), tree.along([level[:, 0] for level in table])
        for row, y in enumerate(as_tuples(tree)):
            own = [slow.step(policy, y[:t]) for t in range(len(y))]
            padding = [0.0] * (max_new_tokens - len(y))
            assert actions[row].tolist() == pytest.approx([own[t][y[t]] for t in range(len(y))] + padding)
            assert states[row].tolist() == pytest.approx([step[0] for step in own] + padding)

    def test_a_million_completions_take_a_few_calls_of_the_policy(self):
        tree, policy, calls = TokenTree(8, [0], 7), random_policy(8, 0), []

        def counted(prompt_ids, prefixes):
            calls.append(len(prefixes))
            return policy(prompt_ids, prefixes)

        assert tree.num_completions == sum(7**t for t in range(6)) + 7**6 * 8  # ended early, and at full length
        oracle = Oracle(tree, [PROMPT], counted, random_reward, beta=0.1)
        assert oracle.optimal_logprobs.exp().sum().item() == pytest.approx(1)
        assert sum(calls) == sum(7**t for t in range(7))  # each prefix once
        assert len(calls) <= 64

    def test_too_many_completions_are_refused_before_memory_is(self):
        with pytest.raises(ValueError, match=r"vocab_size \(32000\) and max_new_tokens \(64\)"):
            TokenTree(32_000, [2], 64)
        with pytest.raises(ValueError, match="more than the 160,000,000 tokens in all that can be enumerated"):
            TokenTree(32_000, [2], 1024)

    @pytest.mark.parametrize(
        ("vocab_size", "stop_ids", "max_new_tokens"),
        [(2, [0], 13_000), (2, [0], 19_999_999), (2, [], 10**7), (3, [0, 1, 2], 10**9)],
    )
    def test_few_completions_that_are_too_long_are_refused_at_once(self, vocab_size, stop_ids, max_new_tokens):
        with pytest.raises(ValueError, match=rf"max_new_tokens \({max_new_tokens}\) make completions of more than"):
            TokenTree(vocab_size, stop_ids, max_new_tokens)

    def test_long_completions_take_operations_by_their_length_not_by_its_square(self):
        operations = []
        for length in (100, 200):
            with CountOperations() as count:
                tree = TokenTree(2, [0], length)
                uniform = tree.tabulate(lambda prompt, prefixes: torch.full((len(prefixes), 2), 0.5).log(), PROMPT)
                assert torch.equal(tree.along(uniform).ne(0).sum(1), tree.lengths)
            operations.append(count.operations)
        assert operations[1] < 2.2 * operations[0]

    @pytest.mark.parametrize("stop_ids", [[3], [-1]])
    def test_stop_ids_out_of_the_vocabulary_are_refused(self, stop_ids):
        with pytest.raises(ValueError, match="stop_ids"):
            TokenTree(3, stop_ids, 2)

    def test_logits_in_place_of_log_probs_are_refused(self):
        with pytest.raises(ValueError, match="do not sum to one"):
            TokenTree(3, [0], 2).tabulate(lambda prompt, prefixes: torch.zeros(len(prefixes), 3), PROMPT)

    def test_nan_is_refused(self):
        with pytest.raises(ValueError, match="do not sum to one"):
            TokenTree(3, [0], 2).tabulate(lambda prompt, prefixes: torch.full((len(prefixes), 3), torch.nan), PROMPT)

    def test_another_vocabulary_is_refused(self):
        with pytest.raises(ValueError, match=r"gave \(1, 4\) for level 0, expected \(1, 3\)"):
            TokenTree(3, [0], 2).tabulate(random_policy(4, 0), PROMPT)

    @pytest.mark.parametrize(
        ("wrong", "told"),
        {
            "one row, which would broadcast": ([(1, 3), (1, 3)], r"must be \(2, 3\) at level 1, got \(1, 3\)"),
            "another vocabulary": ([(1, 4), (2, 4)], r"must be \(1, 3\) at level 0, got \(1, 4\)"),
            "too few levels": ([(1, 3)], "must have 2 levels, one per token, got 1"),
            "too many levels": ([(1, 3), (2, 3), (4, 3)], "must have 2 levels, one per token, got 3"),
        }.values(),
    )
    def test_the_table_of_another_tree_is_refused(self, wrong, told):
        tree, table = TokenTree(3, [0], 2), [torch.zeros(shape) for shape in wrong]
        for function in (tree.completion_logprobs, tree.along):
            with pytest.raises(ValueError, match=f"table {told.replace(' at', '.* at')}"):
                function(table)

    def test_a_table_of_states_is_none_of_a_policy(self):
        tree = TokenTree(3, [0], 2)
        states = [torch.zeros(1), torch.zeros(2)]
        assert tree.along(states).shape == (7, 2)
        with pytest.raises(ValueError, match=r"table must be \(1, 3\) at level 0, got \(1,\)"):
            tree.completion_logprobs(states)

    @every_shape
    def test_the_most_likely_completion_takes_the_best_token_at_each_step(self, vocab_size, stop_ids, max_new_tokens):
        policy, taken = random_policy(vocab_size, 2), []
        while len(taken) < max_new_tokens and not set(taken) & set(stop_ids):
            taken.append(policy(PROMPT, torch.tensor([taken], dtype=torch.int64).view(1, -1)).argmax().item())
        tree = TokenTree(vocab_size, stop_ids, max_new_tokens)
        assert tree.most_likely(tree.tabulate(policy, PROMPT)).item() == tree.index(taken)

    @pytest.mark.parametrize("shape", [(7, 1), (6,), (8,), ()])
    def test_values_of_more_or_fewer_completions_are_refused(self, shape):
        tree = TokenTree(3, [0], 2)
        assert [tuple(x.shape) for x in tree.by_level(torch.zeros(7))] == [(1, 1), (2, 3)]
        with pytest.raises(ValueError, match=r"must be \(7,\), got \(" + ", ".join(map(str, shape))):
            tree.by_level(torch.zeros(shape))
