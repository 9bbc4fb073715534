"""What jsonargparse says of a value, in one line: the option, what was expected, what was given, and why."""

import ast
import re
from collections.abc import Callable, Sequence
from itertools import pairwise

from lit_rlhf.cli.imports import failed_import
from lit_rlhf.cli.unknown_options import settings_in
from lit_rlhf.cli.yaml_classes import IN_ITS_CLASS
from lit_rlhf.errors import PLAIN, one_line

TYPES = {kind.__name__: words for kind, (_, words) in PLAIN.items()} | {
    "dict": "a mapping, '{{name: value}}'",
    "list": "a list, '[{}]'",
    "tuple": "a list, '[{}]'",
}
OPTION = re.compile(r'Parser key "([^"]+)"')
GIVEN = re.compile(r"Given value: ([^\n]*)")
GOT = re.compile(r"Got value: ([^\n]*)")
NESTED = re.compile(r"NestedArg\(key='([\w.]+)', val='?(.*?)'?\)")
EXPECTED = re.compile(
    r"Expected a (?:<class '(?P<type>\w+)'>|typing\.Literal\[(?P<choices>[^\]]+)\]|\w+ with (?P<count>\d+) elements)"
    r"|Not a valid subclass of (?P<kind>\w+)|to a subclass of (?P<base>\w+)"
    r"|(?P<function>expects a function or a callable class)"
)
SUBTYPES = re.compile(r"Subtypes: \[([^\n]*)\]")
NO_MODULE = re.compile(r"No module named '([\w.]+)'")
NO_VALUE = re.compile(r"argument (?:-\w/)?(--[\w.]+): expected one argument")


def wrong_value(message: str, as_typed: Callable[[str, str | None], str]) -> str | None:
    """One line for a value that is of no type that it may have; None for any other message.

    Args:
        message: of jsonargparse.
        as_typed: an option as it stands on the command line, or its place in a config; given its name and its value.
    """
    options = OPTION.findall(message)
    given = GIVEN.findall(message) or GOT.findall(message)
    if not options or not given:
        return None
    value, option = given[-1], options[-1]
    if nested := NESTED.fullmatch(value):  # an argument of a class, given by itself
        option, value = f"{option}.{nested[1]}", nested[2]
    option = as_typed(option, value)
    shown = "null" if value == "None" else one_line(value) or "empty text"
    if beside := keys_beside_a_class(value):
        return f"{option}: {', '.join(beside)} must stand below init_args, not beside class_path"
    if fault := failed_import(value):
        return f"{option}: {fault}"
    words = list(dict.fromkeys(expectations(message)))
    if settings := settings_in(message):
        words = [f"a mapping of options, such as '{{{settings}}}'", "null"]
    words.sort(key=lambda word: word == "null")  # last, as an afterthought
    if option.endswith(("model", "data")) and words[0].startswith("the import path of a subclass"):
        words = words[:1]  # jsonargparse lets a class be null
    if missing := NO_MODULE.search(message):
        named = re.search(r"given class_path '([\w.]+)'", message)
        shown = named[1] if named else shown
    wanted = ", or ".join(words).format(value.strip("[](), "))
    why = f"; there is no module {missing[1]} in the current folder or among what is installed" if missing else ""
    return f"{option}: expected {wanted}, got {shown}{why}" if wanted else None


def below_a_value(message: str) -> str | None:
    """The option that a message is about where it was written below one that has no options; None of any other."""
    options, given = OPTION.findall(message), GIVEN.findall(message) or GOT.findall(message)
    nested = NESTED.fullmatch(given[-1]) if options and given else None
    words = expectations(message)
    causes = [line for line in message.splitlines() if line.lstrip().startswith("- ")]
    plain = words and all("Expected a " in cause for cause in causes)
    plain = plain and not any("import path" in word or "mapping" in word for word in words)
    return f"{options[-1]}.{nested[1]}" if nested and plain else None


def no_value(message: str, typed: Sequence[str]) -> str | None:
    """One line for an option that stands alone; None for any other message.

    Args:
        message: of argparse, which names the option that it stands below, such as --model.
        typed: the command line.
    """
    found = NO_VALUE.search(message)
    if found is None:
        return None
    alone = [option for option, after in pairwise([*typed, "--"]) if "=" not in option and after.startswith("-")]
    named = [option for option in alone if option == found[1] or option.startswith(f"{found[1]}.")]
    option = named[0] if named else found[1]
    return f"{option}: expected a value, as in {option}=...; true and false are written out, too"


def expectations(message: str) -> list[str]:
    """What a value may be, in words."""
    words = []
    for found in EXPECTED.finditer(message):
        if found["type"]:
            words.append(TYPES.get(found["type"], found["type"]))
        elif found["choices"]:
            words.append(found["choices"].replace("', '", "' or '").replace("{", "{{").replace("}", "}}"))
        elif found["count"]:
            words.append(f"a list of {found['count']}")
        elif found["function"]:
            words.append("the import path of a function")
        else:
            words.append(f"the import path of a subclass of {found['kind'] or found['base']}")
    if ("import path" in message or "class_path" in message) and not any("import path" in word for word in words):
        for types in SUBTYPES.findall(message):
            words += [
                f"the import path of a subclass of {kind}" for kind in re.findall(r"<class '(?:\w+\.)+(\w+)'>", types)
            ]
    return words


def keys_beside_a_class(value: str) -> list[str]:
    """Keys of a mapping with a class_path that belong to the arguments of that class."""
    try:
        given = ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return sorted(set(given) - IN_ITS_CLASS) if isinstance(given, dict) and "class_path" in given else []
