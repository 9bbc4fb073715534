"""The tree of all completions, level by level. Axes as in the package docstring."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# prompt_ids (P,), prefixes (n, t) of response tokens -> (n, V) log-probs of the next token
LogprobFn = Callable[[Tensor, Tensor], Tensor]

MAX_COMPLETIONS = 20_000_000  # about 10 GB with 8 tokens each


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
        self._sizes = [self.num_prefixes(t) * len(self.closing_ids(t)) for t in range(max_new_tokens)]
        self.num_completions = sum(self._sizes)
        if self.num_completions > MAX_COMPLETIONS:
            raise ValueError(
                f"vocab_size ({vocab_size}) and max_new_tokens ({max_new_tokens}) make more completions than the "
                f"{MAX_COMPLETIONS:,} that can be enumerated; lower one of them"
            )
        self.completions = self._list_completions()
        self.lengths = torch.arange(1, max_new_tokens + 1).repeat_interleave(torch.tensor(self._sizes))

    def num_prefixes(self, level: int) -> int:
        """K^t: how many prefixes of `level` response tokens have not ended."""
        return len(self.open_ids) ** level

    def closing_ids(self, level: int) -> Tensor:
        """Tokens that end a completion when taken at this level: the stop ids, and all at the last level."""
        return self._stop_ids if level < self.max_new_tokens - 1 else self._all_ids

    def by_level(self, completion_values: Tensor) -> list[Tensor]:
        """(C,) one value per completion -> for each level, (K^t, len(closing_ids)): by prefix and last token."""
        parts = enumerate(completion_values.split(self._sizes))
        return [part.view(self.num_prefixes(level), len(self.closing_ids(level))) for level, part in parts]

    def prefixes(self, level: int) -> Tensor:
        """(K^t, t) int64: the prefixes of `level` response tokens that have not ended, in order."""
        if level == 0:
            return torch.empty(1, 0, dtype=torch.int64)
        return torch.cartesian_prod(*[self.open_ids] * level).view(-1, level)

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

    def completion_logprobs(self, table: Sequence[Tensor]) -> Tensor:
        """(C,) log π(y|x) of all completions, from the policy's table; their `exp` sums to one."""
        closed, prefix_logprobs = [], torch.zeros(1, dtype=torch.float64)
        for level, logprobs in enumerate(table):
            joint = prefix_logprobs[:, None] + logprobs
            closed.append(joint[:, self.closing_ids(level)].flatten())
            prefix_logprobs = joint[:, self.open_ids].flatten()
        return torch.cat(closed)

    def along(self, table: Sequence[Tensor]) -> Tensor:
        """(C, T) what each completion meets on its way: the table at its states or actions, 0 past its end."""
        K, rows = len(self.open_ids), []
        for level, completions in enumerate(self.completions.split(self._sizes)):
            prefix = torch.arange(self.num_prefixes(level)).repeat_interleave(len(self.closing_ids(level)))
            columns = [table[0].new_zeros(len(prefix))] * self.max_new_tokens
            for t in range(level + 1):
                ancestor = prefix // max(K, 1) ** (level - t)
                columns[t] = table[t][ancestor] if table[t].ndim == 1 else table[t][ancestor, completions[:, t]]
            rows.append(torch.stack(columns, dim=1))
        return torch.cat(rows)

    def _list_completions(self) -> Tensor:
        completions = torch.zeros(self.num_completions, self.max_new_tokens, dtype=torch.int64)
        for level, rows in enumerate(completions.split(self._sizes)):
            prefixes, closing = self.prefixes(level), self.closing_ids(level)
            rows[:, :level] = prefixes.repeat_interleave(len(closing), dim=0)
            rows[:, level] = closing.repeat(len(prefixes))
        return completions
