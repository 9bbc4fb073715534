"""The error that a user can mend: the CLI prints its message alone, without a traceback."""


class UserError(ValueError):
    """Bad input or configuration; says what came, what was expected and what to do."""
