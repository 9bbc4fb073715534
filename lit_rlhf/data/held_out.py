"""A share of the training rows that is held out for validation, the same rows wherever it is asked for."""

from typing import NamedTuple

import xxhash

from lit_rlhf.data.formats import Row, as_prompt
from lit_rlhf.data.plain import as_json
from lit_rlhf.errors import UserError, one_line


class Side(NamedTuple):
    """One side of a split of the training rows."""

    share: float  # of the rows, about, that are held out
    held_out: bool  # whether these are meant, or all others

    def has(self, row: Row, place: str) -> bool:
        """Whether a checked row is on this side.

        By a hash of its prompt, or of all of it where it has none: rows of one prompt, of whatever source, stay
        together, so that nothing that is validated on has been learnt; and a row stays where it is as others come.
        """
        asked = row if "prompt" in row else (as_prompt(row) or {}) if "messages" in row else {}
        told = {"prompt": asked["prompt"]} if asked else row
        return (xxhash.xxh3_64_intdigest(as_json(told, place).encode()) < self.share * 2**64) is self.held_out


def share_of(given: object, option: str) -> float | None:
    """The share that an option asks for; None where it names sources.

    Raises:
        UserError: a number that is no share.
    """
    if isinstance(given, bool) or not isinstance(given, int | float):
        return None
    if not 0 < given < 1:
        raise UserError(
            f"{option} ({one_line(repr(given))}) must be a share of the training rows, above 0 and below 1, or name "
            "held-out rows"
        )
    return float(given)
