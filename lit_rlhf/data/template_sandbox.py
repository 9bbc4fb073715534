"""What chat templates run in, which come with models that strangers hand over."""

from typing import Any

from jinja2.filters import do_round
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

__all__ = ["BoundedEnvironment", "render_jinja_template"]

MOST_BITS = 2**12  # of a whole number


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """What transformers runs templates in, without numbers so long that one operation takes hours: no alarm ends it."""

    intercepted_binops = frozenset({"*", "/", "//", "%", "**"})

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.filters["round"] = _round

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """What an operator gives.

        Raises:
            SecurityError: two whole numbers, of which the result has more bits than any template needs.
        """
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MOST_BITS:
                raise SecurityError(f"{operator} of numbers whose result may have {bits} bits, more than {MOST_BITS}")
        return super().call_binop(context, operator, left, right)


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    """Jinja's filter, which takes a power of ten."""
    if abs(precision) > MOST_BITS:
        raise SecurityError(f"round to {precision} digits")
    return do_round(value, precision, method)


# The only way in: transformers makes one for each template.
chat_template_utils.ImmutableSandboxedEnvironment = BoundedEnvironment  # type: ignore[misc]
