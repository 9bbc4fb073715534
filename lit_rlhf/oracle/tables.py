"""A policy that is a table of logits: the smallest one that can be any policy at all, the optimum included."""

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lit_rlhf.engine.shapes import check_shapes
from lit_rlhf.oracle.tree import LogprobFn, Prompts, TokenTree, prompt_tensors


class TablePolicy(nn.Module):
    """Logits of the next token for each prompt and prefix, learnt or copied.

    A *state* is a prompt and a prefix that has not ended. States are numbered by prompt, then level, then in the order
    of `tree.prefixes`; N of them in all.

    Args:
        tree: of the completions.
        prompts: each (P,) token ids; their order numbers them.
        start: where the logits start, such as the reference; None = 0, the uniform policy.

    Attributes:
        logits: (N, V) the parameter.
    """

    def __init__(self, tree: TokenTree, prompts: Prompts, start: LogprobFn | None = None) -> None:
        super().__init__()
        self.tree, prompts = tree, prompt_tensors(prompts)
        self.numbers = {tuple(prompt_ids.tolist()): number for number, prompt_ids in enumerate(prompts)}
        sizes = [tree.num_prefixes(level) for level in range(tree.max_new_tokens)]
        self.offsets = torch.tensor([0, *sizes]).cumsum(0)  # (T + 1,) where each level starts
        self.open_index = torch.zeros(tree.vocab_size, dtype=torch.int64)
        self.open_index[tree.open_ids] = torch.arange(len(tree.open_ids))
        logits = torch.zeros(len(prompts) * self.states_per_prompt, tree.vocab_size, dtype=torch.float64)
        if start is not None:
            tables = [torch.cat(tree.tabulate(start, prompt_ids)) for prompt_ids in prompts]
            logits = torch.cat(tables).detach()
        self.logits = nn.Parameter(logits)

    def moved(self, distance: float, seed: int = 0) -> "TablePolicy":
        """Another table, whose logits are these and noise from N(0, distance²)."""
        draw = torch.Generator().manual_seed(seed)
        other = copy.deepcopy(self)
        with torch.no_grad():
            other.logits.add_(distance * torch.randn(self.logits.shape, generator=draw, dtype=torch.float64))
        return other

    @property
    def states_per_prompt(self) -> int:
        """How many prefixes have not ended, over all levels."""
        return int(self.offsets[-1])

    def forward(self, states: Tensor) -> Tensor:
        """(n,) states -> (n, V) log-probs of the next token."""
        return torch.log_softmax(self.logits[states], dim=-1)

    @check_shapes
    def states(self, prompt_numbers: Int[Tensor, " B"], responses: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
        """The state in which each token of a response was taken.

        Args:
            prompt_numbers: (B,) int64.
            responses: (B, T) int64, anything past an end.

        Returns:
            (B, T) int64; past an end some state, which a mask leaves out.

        Raises:
            ValueError: responses longer than those of the tree.
        """
        if responses.shape[1] > self.tree.max_new_tokens:
            longest = self.tree.max_new_tokens
            raise ValueError(f"responses of {responses.shape[1]} tokens; expected at most {longest}, as of the tree")
        K = len(self.tree.open_ids)
        prefix = torch.zeros(len(responses), dtype=torch.int64)
        columns = []
        for level in range(responses.shape[1]):
            columns.append(self.offsets[level] + prefix)
            prefix = prefix * K + self.open_index[responses[:, level]]
        return torch.stack(columns, dim=1) + (prompt_numbers * self.states_per_prompt)[:, None]

    @check_shapes
    def logprob_fn(self, prompt_ids: Int[Tensor, " P"], prefixes: Int[Tensor, "n t"]) -> Float[Tensor, "n V"]:
        """The policy as the oracle takes it: (n, t) prefixes -> (n, V) log-probs of the next token."""
        prompt = tuple(prompt_ids.tolist())
        if prompt not in self.numbers:
            raise ValueError(f"the table has no prompt {list(prompt)}, only {[list(known) for known in self.numbers]}")
        number = torch.full((len(prefixes),), self.numbers[prompt])
        padded = torch.cat([prefixes, torch.zeros(len(prefixes), 1, dtype=torch.int64)], dim=1)
        return self(self.states(number, padded)[:, -1])
