"""The tree of all completions, level by level. Axes as in the package docstring."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

# prompt_ids (P,), prefixes (n, t) of response tokens -> (n, V) log-probs of the next token
LogprobFn = Callable[[Tensor, Tensor], Tensor]

Prompts = Sequence[Tensor | Sequence[int]]  # each (P,) token ids

MAX_TOKENS = 160_000_000  # C T of them: 20 million completions of 8 take about 10 GB


class TokenTree:
    """All completions over a vocabulary: up to `max_new_tokens` tokens, ended early by a stop token.

    Completions are ordered by length, then by the tokens before the last, then by the last.

    Args:
        vocab_size: V, the width of the policy's logits.
        stop_ids: tokens that end a completion and are its last token; may be empty.
        max_new_tokens: T, where a completion ends at the latest.

    Attributes:
        num_completions: C.
        completions: (C, T) int64, 0 past an end.
        lengths: (C,) int64, tokens in each, the stop token included.
        open_ids: (K,) int64, the tokens that do not end a completion.
    """

    def __init__(self, vocab_size: int, stop_ids: Sequence[int], max_new_tokens: int) -> None:
        stops = sorted(set(stop_ids))
        if vocab_size < 1 or max_new_tokens < 1:
            raise ValueError(f"vocab_size ({vocab_size}) and max_new_tokens ({max_new_tokens}) must be 1 or more")
        if stops and not (stops[0] >= 0 and stops[-1] < vocab_size):
            raise ValueError(f"stop_ids {stops} must be in the vocabulary, 0 to {vocab_size - 1}")
        self.vocab_size, self.max_new_tokens = vocab_size, max_new_tokens
        self._stop_ids = torch.tensor(stops, dtype=torch.int64)
        self.open_ids = torch.tensor([i for i in range(vocab_size) if i not in set(stops)], dtype=torch.int64)
        self._all_ids = torch.arange(vocab_size)
        self._sizes: list[int] = []
        self.num_completions = 0
        for level in range(max_new_tokens):  # ends early, before numbers are large
            self._sizes.append(self.num_prefixes(level) * len(self.closing_ids(level)))
            self.num_completions += self._sizes[-1]
            if max(self.num_completions, self.num_prefixes(level), max_new_tokens) * max_new_tokens > MAX_TOKENS:
                raise ValueError(
                    f"vocab_size ({vocab_size}) and max_new_tokens ({max_new_tokens}) make completions of more than "
                    f"the {MAX_TOKENS:,} tokens in all that can be enumerated; lower one of them"
                )
        own_ids = [self._all_ids.expand(self.num_prefixes(level), -1) for level in range(max_new_tokens)]
        self.completions = self.along(own_ids)
        self.lengths = torch.arange(1, max_new_tokens + 1).repeat_interleave(torch.tensor(self._sizes))

    def num_prefixes(self, level: int) -> int:
        """K^t: how many prefixes of `level` response tokens have not ended."""
        return len(self.open_ids) ** level

    def closing_ids(self, level: int) -> Tensor:
        """Tokens that end a completion when taken at this level: the stop ids, and all at the last level."""
        return self._stop_ids if level < self.max_new_tokens - 1 else self._all_ids

    def by_level(self, completion_values: Tensor) -> list[Tensor]:
        """(C,) one value per completion -> for each level, (K^t, len(closing_ids)): by prefix and last token.

        Raises:
            ValueError: there are more or fewer values than completions.
        """
        if completion_values.shape != (self.num_completions,):
            given = tuple(completion_values.shape)
            raise ValueError(f"values of the completions must be ({self.num_completions},), got {given}")
        parts = enumerate(completion_values.split(self._sizes))
        return [part.view(self.num_prefixes(level), len(self.closing_ids(level))) for level, part in parts]

    def prefixes(self, level: int) -> Tensor:
        """(K^t, t) int64: the prefixes of `level` response tokens that have not ended, in order."""
        if level == 0:
            return torch.empty(1, 0, dtype=torch.int64)
        K, T = len(self.open_ids), self.max_new_tokens
        longest = self.completions[self.num_completions - self._sizes[-1] :]  # each prefix begins as many, one by one
        return longest[:: max(1, K ** (T - 1 - level) * self.vocab_size), :level].clone()

    def index(self, completion: Sequence[int]) -> int:
        """Where in 0..C-1 a completion stands.

        Raises:
            ValueError: it is no completion of this tree: not ended, too long, or with tokens after its end.
        """
        tokens = [int(token) for token in completion]
        level, K = len(tokens) - 1, len(self.open_ids)
        opens, closing = self.open_ids.tolist(), []
        if 0 <= level < self.max_new_tokens:
            closing = self.closing_ids(level).tolist()
        if not tokens or tokens[-1] not in closing or any(token not in opens for token in tokens[:-1]):
            raise ValueError(
                f"{tokens} is no completion: it must end by a stop token or at {self.max_new_tokens} tokens"
            )
        prefix = 0
        for token in tokens[:-1]:
            prefix = prefix * K + opens.index(token)
        return sum(self._sizes[:level]) + prefix * len(closing) + closing.index(tokens[-1])

    def tabulate(self, logprob_fn: LogprobFn, prompt_ids: Tensor) -> list[Tensor]:
        """A policy as a table: (K^t, V) log-probs of the next token, for each level t.

        Args:
            logprob_fn: called once per level, with all its prefixes.
            prompt_ids: (P,) handed on.

        Raises:
            ValueError: what `logprob_fn` returns has another shape or does not sum to one.
        """
        if isinstance(logprob_fn, PreTrainedModel):
            kind = type(logprob_fn).__name__
            raise ValueError(f"a policy is a function of a prompt and prefixes: of a {kind}, give causal_lm(model)")
        table = []
        for level in range(self.max_new_tokens):
            prefixes = self.prefixes(level)
            logprobs = logprob_fn(prompt_ids, prefixes).cpu().double()
            if logprobs.shape != (len(prefixes), self.vocab_size):
                expected = (len(prefixes), self.vocab_size)
                raise ValueError(f"logprob_fn gave {tuple(logprobs.shape)} for level {level}, expected {expected}")
            worst = logprobs.detach().logsumexp(-1).abs().max().item() if len(prefixes) else 0.0
            if not worst < 1e-4:
                raise ValueError(f"probabilities at level {level} do not sum to one (log of the sum: {worst:.3g})")
            table.append(logprobs)
        return table

    def check_table(self, table: Sequence[Tensor], name: str = "table", of_states: bool = False) -> None:
        """Refuse a table of another tree, or of another kind, which would broadcast.

        Args:
            table: (K^t, V) for each level t; or (K^t,), where it may be of states.
            name: what the caller calls it.
            of_states: whether it may.

        Raises:
            ValueError: names the first level that is wrong, its shape and the right one.
        """
        if len(table) != self.max_new_tokens:
            raise ValueError(f"{name} must have {self.max_new_tokens} levels, one per token, got {len(table)}")
        for level, given in enumerate(table):
            shape = (self.num_prefixes(level), self.vocab_size)
            if given.shape not in ((shape, shape[:1]) if of_states else (shape,)):
                right = f"{shape} or {shape[:1]}" if of_states else shape
                raise ValueError(f"{name} must be {right} at level {level}, got {tuple(given.shape)}")

    def completion_logprobs(self, table: Sequence[Tensor]) -> Tensor:
        """(C,) log π(y|x) of all completions, from the policy's table; their `exp` sums to one."""
        self.check_table(table)
        closed, prefix_logprobs = [], torch.zeros(1, dtype=torch.float64)
        for level, logprobs in enumerate(table):
            joint = prefix_logprobs[:, None] + logprobs
            closed.append(joint[:, self.closing_ids(level)].flatten())
            prefix_logprobs = joint[:, self.open_ids].flatten()
        return torch.cat(closed)

    def along(self, table: Sequence[Tensor]) -> Tensor:
        """(C, T) what each completion meets on its way: the table at its states or actions, 0 past its end."""
        self.check_table(table, of_states=True)
        rows, path = [], table[0].new_empty(1, 0)  # (K^t, t) along each prefix
        for level, step in enumerate(table):
            actions = step if step.ndim == 2 else step[:, None].expand(-1, self.vocab_size)
            ended = self._longer(path, actions, self.closing_ids(level))
            rows.append(F.pad(ended, (0, self.max_new_tokens - level - 1)))
            if level < self.max_new_tokens - 1:
                path = self._longer(path, actions, self.open_ids)
        return torch.cat(rows)

    def most_likely(self, table: Sequence[Tensor]) -> Tensor:
        """() int64: the completion that takes the most likely token at each step, of the first ones of equals."""
        chosen = self.along([F.one_hot(level.argmax(-1), self.vocab_size).double() for level in table])
        return (chosen.sum(1) == self.lengths).nonzero()[0, 0]

    @staticmethod
    def _longer(path: Tensor, actions: Tensor, tokens: Tensor) -> Tensor:
        """Each of (n, t) paths goes on with the (n, V) entry of each of these k tokens: (n k, t + 1)."""
        return torch.cat([path.repeat_interleave(len(tokens), dim=0), actions[:, tokens].reshape(-1, 1)], dim=1)


def prompt_tensors(prompts: Prompts) -> list[Tensor]:
    """Each prompt as (P,) int64.

    Raises:
        ValueError: one of them has no axis or several, such as the ids of a single prompt that is in no list.
    """
    tensors = [torch.as_tensor(prompt_ids) for prompt_ids in prompts]
    for prompt_ids in tensors:
        if prompt_ids.ndim != 1 or (prompt_ids.is_floating_point() and prompt_ids.numel()):
            kind = f"{tuple(prompt_ids.shape)} {prompt_ids.dtype}"
            raise ValueError(f"prompts must be a list of prompts, each (P,) integer token ids; one of them is {kind}")
    return [prompt_ids.long() for prompt_ids in tensors]
