"""The checks of arguments, one by one; `test_task.py` has what the envs make of them."""

import numpy as np
import pytest

from token_mdp import TokenEnv
from token_mdp.checks import (
    _memory,
    check_choice,
    check_count,
    check_flag,
    check_function,
    check_render_mode,
    check_room,
    check_share,
)

ACCEPTED = [
    (check_count, (1, np.int32(7), 10**12)),
    (check_share, (0, 1, 0.5, np.float32(0.25))),
    (check_flag, (True, False, np.bool_(True))),
    (lambda name, value: check_choice(name, value, ("a", "b")), ("a", "b")),
    (lambda name, value: check_render_mode(value, ["ansi"]), (None, "ansi")),
    (check_function, (None, len, TokenEnv)),
]
REFUSED = [
    (check_count, (0, -1, 1.0, "1", None, True, np.float64(3)), "an integer and at least 1"),
    (check_share, (-0.1, 1.1, float("nan"), "x", None, True, 1j), "a number in 0..1"),
    (check_flag, (0, 1, "yes", None), "True or False"),
    (
        lambda name, value: check_choice(name, value, ("a", "b")),
        ("c", "A", None, 3, np.ones(2), ["a"]),
        "one of ('a', 'b')",
    ),
    (lambda name, value: check_render_mode(value, ["ansi"]), ("human", 1, np.ones(2), {}), "None or one of ['ansi']"),
    (check_function, (3, "len", [len]), "a function (prompts, responses, **columns) -> (n,)"),
]


def test_what_fits_passes():
    for check, values in ACCEPTED:
        for value in values:
            check("render_mode", value)


@pytest.mark.parametrize(
    ("check", "value", "wanted"), [(check, value, wanted) for check, values, wanted in REFUSED for value in values]
)
def test_what_does_not_fit_is_refused_with_name_value_and_what_is_wanted(check, value, wanted):
    with pytest.raises(ValueError) as error:
        check("render_mode", value)
    assert str(error.value).startswith(f"render_mode ({value!r}) must be ") and wanted in str(error.value)


def test_sizes_are_held_against_the_memory_of_the_machine(monkeypatch):
    sizes = {"num_slots": 10, "width": 100, "vocab_size": 1000, "masks": True, "named": "num_envs (10)"}
    monkeypatch.setattr("token_mdp.checks._memory", lambda: 10 * 100 * 48 + 1000 * 21)
    check_room(**sizes)
    with pytest.raises(ValueError, match=r"^num_envs \(10\) would take about 0 GB; this machine has 0 GB$"):
        check_room(**sizes | {"width": 101})
    monkeypatch.setattr("token_mdp.checks._memory", lambda: None)  # a system that does not tell
    check_room(**sizes | {"width": 10**15})


def test_the_memory_of_a_system_that_does_not_tell_is_unknown(monkeypatch):
    assert _memory() > 10**8
    monkeypatch.delattr("os.sysconf")  # as on Windows
    assert _memory() is None
