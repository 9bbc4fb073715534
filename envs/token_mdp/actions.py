"""Refusing actions that are no tokens, or tokens that may not come next, with their values and slots."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.error import InvalidAction

from token_mdp.checks import as_array
from token_mdp.episodes import IntArray
from token_mdp.task import BoolArray


def checked_token(action: Any, vocab_size: int, allowed: BoolArray | None, prompt_index: int) -> int:
    """The action of one env as a token.

    Args:
        action: what the agent gave.
        vocab_size: V.
        allowed: (V,) tokens that may come next; None allows all.
        prompt_index: for the error's text.

    Raises:
        InvalidAction: not one integer in 0..V-1, or not allowed.
    """
    value = as_array(action)
    if value.size != 1 or value.dtype.kind not in "iu":
        raise InvalidAction(f"an action is one integer token id, got {action!r}")
    token = int(value.item())
    if not 0 <= token < vocab_size:
        raise InvalidAction(f"token {token} is outside the vocabulary 0..{vocab_size - 1}")
    if allowed is not None and not allowed[token]:
        raise InvalidAction(f"token {token} is not allowed here by action_mask (prompt {prompt_index})")
    return token


def checked_tokens(
    actions: Any, running: IntArray, num_slots: int, vocab_size: int, allowed: BoolArray | None
) -> IntArray:
    """The actions of the running slots as tokens, (n,).

    Args:
        actions: (B,) what the agent gave; that of slots which do not run is ignored.
        running: (n,) slots.
        num_slots: B.
        vocab_size: V.
        allowed: (B, V) tokens that may come next; None allows all.

    Raises:
        InvalidAction: not B integers, or one of a running slot outside 0..V-1 or not allowed.
    """
    given = as_array(actions)
    if given.shape != (num_slots,) or given.dtype.kind not in "iu":
        raise InvalidAction(f"actions must be {num_slots} integer token ids, got shape {given.shape} of {given.dtype}")
    if len(running) < num_slots:
        given = given[running]
    tokens = given.astype(np.int64, copy=False)  # a huge uint64 becomes negative
    # One comparison for both bounds: seen as unsigned, a negative token is a huge one.
    bad = tokens.view(np.uint64) >= vocab_size
    if bad.any():
        raise InvalidAction(f"{_named(given[bad], running[bad])} are outside the vocabulary 0..{vocab_size - 1}")
    if allowed is not None and not allowed[running, tokens].all():
        bad = ~allowed[running, tokens]
        raise InvalidAction(f"{_named(tokens[bad], running[bad])} are not allowed there by action_mask")
    return tokens


def _named(tokens: IntArray, slots: IntArray) -> str:
    """Tokens and their slots for an error's text, the first of very many."""
    more = f" and {len(slots) - 10} more" if len(slots) > 10 else ""
    return f"tokens {tokens[:10].tolist()} in slots {slots[:10].tolist()}{more}"
