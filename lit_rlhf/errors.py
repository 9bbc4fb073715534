"""The error that a user can mend: the CLI prints its message alone, without a traceback."""


class UserError(ValueError):
    """Bad input or configuration; says what came, what was expected and what to do."""


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Refuse an option whose value does not hold to what is expected of it."""
    if not holds:
        raise UserError(f"{name} ({value}) must be {expected}")
