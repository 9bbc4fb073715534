"""Episodes as text: prompt, response and reward in labelled lines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from token_mdp.episodes import FinishReason, IntArray
from token_mdp.slots import Slots

NO_RENDER_MODE = "render() without a render_mode; make the env with render_mode='ansi', 'human' or 'rgb_array'"


def episode_text(
    prompt_ids: Sequence[int] | IntArray,
    response_ids: Sequence[int] | IntArray,
    outcome: str,
    tokenizer: Any = None,
    title: str = "",
) -> str:
    """The episode in three labelled lines (more where the text has line breaks): prompt, response, reward.

    Args:
        prompt_ids: (P',) tokens of the prompt.
        response_ids: (T',) tokens of the response so far.
        outcome: what to say about the reward.
        tokenizer: anything with `decode(ids) -> str`; None shows the ids themselves.
        title: a line above, as "slot 3".
    """
    lines = [
        _labelled("prompt", _decoded(prompt_ids, tokenizer)),
        _labelled("response", _decoded(response_ids, tokenizer)),
        _labelled("reward", outcome),
    ]
    return "\n".join([title, *lines] if title else lines)


def slot_text(slot: int, slots: Slots, reason: int | None, reward: float | None, tokenizer: Any) -> str:
    """`episode_text` of one slot of a vector env; a `reason` of None is that of a slot without an episode."""
    outcome = "none: this slot has no episode" if reason is None else outcome_text(reason, reward)
    return episode_text(slots.prompt(slot), slots.response(slot), outcome, tokenizer, title=f"slot {slot}")


def outcome_text(reason: int, reward: float | None) -> str:
    """The reward and why the episode ended, once it has (`reason` is not 0); None for a deferred reward."""
    if not reason:
        return "not yet"
    return f"{'deferred' if reward is None else f'{reward:.4g}'} ({FinishReason(reason).label})"


class EpisodePrinter:
    """Prints `episode_text` to stdout while the episode goes on: the response grows on its line.

    Args:
        tokenizer: as in `episode_text`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._shown = ""  # what is printed of the response
        self._mid_line = False

    def begin(self, prompt_ids: IntArray) -> None:
        """A prompt; on a new line, also if the last episode was cut short."""
        head = _labelled("prompt", _decoded(prompt_ids, self._tokenizer))
        self._shown = _labelled("response", "")
        print("\n" * self._mid_line, head, "\n", self._shown, sep="", end="", flush=True)
        self._mid_line = True

    def show(self, response_ids: IntArray, reason: int, reward: float) -> None:
        """What has come since the last call, and the reward at the end."""
        text = _decoded(response_ids, self._tokenizer)
        # Half of a character waits for its other tokens, as long as there may be any.
        if reason or not text.endswith("\N{REPLACEMENT CHARACTER}"):
            # Decoding the whole response keeps the spaces that a token alone would lose.
            text = _labelled("response", text)
            if text.startswith(self._shown):
                sys.stdout.write(text[len(self._shown) :])
            else:  # a later token changed what stands there, as a merge or a clean-up of spaces does
                sys.stdout.write("\n" + text)
            self._shown = text
        if reason:
            print("\n", _labelled("reward", outcome_text(reason, reward)), sep="")
            self._mid_line = False
        sys.stdout.flush()


def _decoded(ids: Sequence[int] | IntArray, tokenizer: Any) -> str:
    tokens = [int(token) for token in ids]
    return " ".join(map(str, tokens)) if tokenizer is None else tokenizer.decode(tokens)


def _labelled(label: str, body: str) -> str:
    return "\n".join(f"{label if row == 0 else '':8} │ {line}" for row, line in enumerate(body.split("\n")))
