"""What is said of a value, with the option that gave it as the user wrote it: on the command line, or in a config."""

import re
from collections.abc import Iterator, Sequence

from lit_rlhf.cli.yaml_files import places, typed_places

OF_VALUE = re.compile(r"(?:[\w.]+: )*([a-z]\w*(?:\.\w+)*) \((.*?)\)(?= )")  # learning_rate (-1.0) must be ...
OF_OPTION = re.compile(r"((?:model|data|trainer)\.\w+(?:\.\w+)*)(?=: )")  # model.critic: ...
OF_NAME = re.compile(r"(reward model: )?'?([^\s':]+)'?(:? )")  # gone: no model ..., or runs/x holds no ...


def by_option(said: str, argv: Sequence[str]) -> str:
    """A message that begins with an argument and its value, or with a value, by the option that gave this.

    Args:
        said: by a constructor, or by what it hands its arguments to, which know nothing of options.
        argv: the command line.

    Returns:
        The same where it begins otherwise, and where no option has such a value: a default is nobody's.
    """
    for about in filter(None, (pattern.match(said) for pattern in (OF_VALUE, OF_OPTION))):
        name, *value = about.groups()
        found = [shown for shown, option, given in _given(argv) if _ends(option, name) and _alike(given, *value)]
        if found:
            return f"{found[-1]}{said[about.end(1) :]}"
    if (held := OF_NAME.match(said)) and (held[3] == ": " or "/" in held[2]):
        named = {option: shown for shown, option, given in _given(argv) if given == held[2]}
        role = ".model" if held[1] else ".policy"  # others of the model's say which they are
        likely = [option for option in named if option.endswith(role)] or [*named]
        return f"{named[likely[-1]]}: {said}" if named else said
    return said


def _given(argv: Sequence[str]) -> Iterator[tuple[str, str, str | None]]:
    """Each option: as it is shown, its name, and its value, None of several; the last one of a name holds."""
    for place in places(argv):
        yield str(place), place.option, place.value
    for option, value in typed_places(argv):
        yield option, option.lstrip("-").replace(".init_args", ""), value


def _ends(option: str, name: str) -> bool:
    return f".{option}".endswith(f".{name}")


def _alike(given: str | None, value: str | None = None) -> bool:
    """Whether a text may stand for a value as messages show it, such as 1e-3 for 0.001."""
    return given is None or value is None or _parts(given) == _parts(value)


def _parts(value: str) -> list[float] | list[str]:
    parts = re.split(r"[\s,]+", value.strip("[](){}'\", ").lower())
    try:
        return [float(part) for part in parts]
    except ValueError:
        return parts
