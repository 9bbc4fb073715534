"""The prompts of a task, and the one queue from which episodes draw them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
from gymnasium.error import ResetNeeded

from token_mdp.answers import shown
from token_mdp.checks import as_array, check_count, check_flag
from token_mdp.episodes import IntArray


class PromptStore:
    """Checked token ids of all prompts; those longer than P lose tokens on the left, and `tokens_cut` says how many.

    Args:
        prompts: one sequence of token ids per prompt.
        vocab_size: V; every id must lie in 0..V-1.
        max_prompt_length: P; None takes the longest prompt.

    Raises:
        ValueError: no prompts, a prompt without tokens, one that is not integers, or an id outside the vocabulary.
    """

    def __init__(self, prompts: Sequence[Any], vocab_size: int, max_prompt_length: int | None = None) -> None:
        if not hasattr(prompts, "__len__") or isinstance(prompts, str | Set | Mapping):
            raise ValueError(f"prompts ({prompts!r:.80}) must be a sequence with the token ids of each prompt")
        if len(prompts) == 0:
            raise ValueError("prompts is empty; the env needs at least one prompt to start an episode from")
        if max_prompt_length is not None:
            max_prompt_length = check_count("max_prompt_length", max_prompt_length)
        rows = [_token_ids(prompt, index, vocab_size) for index, prompt in enumerate(prompts)]
        full_lengths = np.array([len(row) for row in rows], dtype=np.int64)
        self.max_length = int(full_lengths.max()) if max_prompt_length is None else max_prompt_length
        self.lengths: IntArray = np.minimum(full_lengths, self.max_length)  # (N,)
        self.tokens_cut: IntArray = full_lengths - self.lengths  # (N,)
        self._rows = [row[-self.max_length :] for row in rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> IntArray:
        return self._rows[index]

    def digest(self) -> str:
        """A few words that tell these prompts from others: their number, and a hash of lengths and tokens."""
        tokens = hashlib.sha256(self.lengths.tobytes())
        for row in self._rows:
            tokens.update(row.tobytes())
        return f"{len(self)} prompts, sha256 {tokens.hexdigest()[:16]}"

    def check_index(self, index: Any) -> int:
        """The index as an int, or a ValueError that names the prompts there are."""
        if isinstance(index, bool) or not isinstance(index, int | np.integer) or not 0 <= index < len(self):
            raise ValueError(f"prompt_index ({index!r}) must be an integer in 0..{len(self) - 1}")
        return int(index)


class PromptQueue:
    """Deals prompt indices so that each comes once per pass, `group_size` times in a row, whichever slot asks first.

    Several `TokenEnv` may share one queue. The first that is reset with a seed lends it its random generator for good;
    seeds of the others leave the queue as it is, so that `SyncVectorEnv.reset(seed=0)`, which seeds all of them, deals
    each prompt once. Envs that are made anew want a new queue.

    Args:
        num_prompts: number of prompts per pass.
        shuffle: a new random order for each pass, or always 0, 1, 2, …
        group_size: episodes that a prompt is dealt to before the next one comes.
    """

    def __init__(self, num_prompts: int, shuffle: bool = True, group_size: int = 1) -> None:
        check_flag("shuffle", shuffle)
        self.group_size = check_count("group_size", group_size)
        self.num_prompts = check_count("num_prompts", num_prompts)
        self.shuffle = bool(shuffle)
        self.seeded = False  # whether one of the envs has lent it a generator of a known seed
        self._rng: np.random.Generator | None = None
        self._order: list[int] = []
        self._cursor = 0  # episodes dealt in this pass

    @property
    def started(self) -> bool:
        """Whether the queue has a random generator to deal by."""
        return self._rng is not None

    def restart(self, rng: np.random.Generator) -> None:
        """Forget the current pass and deal by `rng` from now on."""
        self._rng, self._order, self._cursor = rng, [], 0

    def draw(self) -> int:
        """The next prompt index."""
        if self._rng is None:
            raise ResetNeeded("draw() before restart(rng): the queue has no random generator to deal by")
        if self._cursor == len(self._order) * self.group_size:
            order = self._rng.permutation(self.num_prompts) if self.shuffle else np.arange(self.num_prompts)
            self._order, self._cursor = order.tolist(), 0
        self._cursor += 1
        return self._order[(self._cursor - 1) // self.group_size]

    def next_group(self) -> None:
        """Deal the next prompt from here on, though the group of the last one may not be full."""
        self._cursor += -self._cursor % self.group_size

    def state_dict(self) -> dict[str, Any]:
        """Order and cursor; the random generator belongs to the env, which saves it."""
        return {"order": list(self._order), "cursor": self._cursor}

    def load_state_dict(self, state: dict[str, Any], rng: np.random.Generator) -> None:
        """Continue where `state` stopped, with later passes shuffled by `rng`."""
        order = [int(index) for index in state["order"]]
        if len(order) not in (0, self.num_prompts) or not 0 <= int(state["cursor"]) <= len(order) * self.group_size:
            raise ValueError(
                f"cursor {state['cursor']} of {len(order)} prompts is saved, this queue deals {self.num_prompts}"
            )
        self._rng, self._order, self._cursor = rng, order, int(state["cursor"])


def _token_ids(prompt: Any, index: int, vocab_size: int) -> IntArray:
    row = as_array(prompt)
    if row.size == 0:
        raise ValueError(f"prompts[{index}] has no tokens; start it with a BOS token if it has no text")
    if row.ndim != 1 or row.dtype.kind not in "iu":
        hint = "; tokenise text first" if isinstance(prompt, str) else ""
        raise ValueError(f"prompts[{index}] must be a flat sequence of token ids, got {shown(prompt)}{hint}")
    if row.min() < 0 or row.max() >= vocab_size:
        token = int(row[(row < 0) | (row >= vocab_size)][0])
        raise ValueError(f"prompts[{index}] contains token {token}, outside the vocabulary 0..{vocab_size - 1}")
    return row.astype(np.int64)
