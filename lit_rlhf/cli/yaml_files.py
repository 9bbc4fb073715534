"""The YAML files that a command line names: refused by file and line, and asked for the line where an option stands."""

import codecs
import difflib
import locale
import re
from collections.abc import Collection, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yaml import MappingNode, Node, ScalarNode, SequenceNode

from lit_rlhf.cli.yaml_classes import IN_ITS_CLASS, PARTS, TRAINER, check_class, check_of_trainer, require_named, shown
from lit_rlhf.demo import CONFIGS
from lit_rlhf.errors import UNREADABLE, UserError

LARGEST = 2**20  # bytes of a config
MOST = 10_000  # values of a config, what is repeated by aliases counted as often
DEEPEST = 50  # levels of a config
TAGS = {"str", "int", "float", "bool", "null", "seq", "map", "merge", "timestamp", "value"}
UTF = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.I)
EXAMPLE = "expected a mapping of options, such as 'trainer: {max_epochs: 1}'"
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Place(NamedTuple):
    """Where an option stands."""

    file: Path
    line: int
    option: str  # as on the command line, without `init_args`
    value: str | None  # None of a mapping or a list
    item: bool = False  # of a list that the option is

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}, {self.option}"


def config_files(argv: Sequence[str]) -> list[Path]:
    """The files that a command line names: configs, and YAML files in place of a part, as in `--trainer=t.yaml`.

    A config that is written out on the command line is none.
    """
    files = []
    for argument, following in pairwise([*argv, ""]):
        option, _, value = argument.partition("=")
        value = value or ("" if "=" in argument or following.startswith("--") else following)
        of_part = option.startswith("--") and "." not in option and value.endswith((".yaml", ".yml"))
        if value and (option in ("-c", "--config") or (of_part and Path(value).exists())):
            inline = "\n" in value or value.startswith("{")
            files += [] if inline else [Path(value)]
    return files


def check_configs(argv: Sequence[str], commands: Sequence[str], parts: Collection[str] = ("trainer", *PARTS)) -> None:
    """Refuse what is wrong with the configs of a command line, before anything is made of them.

    Args:
        argv: the command line.
        commands: what it may do; a config before the command has its options below the command's name.
        parts: options that have options, whose place another value would lose unseen to those of the command line.

    Raises:
        UserError: with file and line.
    """
    for argument, following in pairwise([*argv, "-"]):
        option, _, value = argument.partition("=")
        name = value or following
        if option in ("-c", "--config") and "\n" not in name and ADDRESS.match(name):
            raise UserError(f"--config: {name} is an address, and a config is a local file; download it first")
        if argument in ("-c=", "--config=") or (argument in ("-c", "--config") and not following.strip()):
            raise UserError("--config: expected the name of a YAML file, got empty text")
    for option, tree in _written_out(argv):
        owner, _, name = option.removeprefix("--").removesuffix("+").partition(".")
        if owner == "trainer" and name in TRAINER:
            check_of_trainer(name, tree)
    command = next((number for number, argument in enumerate(argv) if argument in commands), len(argv))
    ahead = config_files(argv[:command])
    for file in config_files(argv):
        tree = read_tree(file)
        names = {key.value: key.start_mark.line + 1 for key, _ in tree.value}
        misplaced = sorted((set(names) & set(commands)) - set(parts))  # `data` is a command, and a part
        if file not in ahead and misplaced:
            name = misplaced[0]
            raise UserError(
                f"{file}, line {names[name]}: options stand at the top of the file, without '{name}:' above them"
            )
        if stray := sorted(IN_ITS_CLASS & set(names)):
            raise UserError(
                f"{file}, line {names[stray[0]]}: {stray[0]} stands at the top of the file; indent it, so that it is "
                "below the model, the data or the part that it is of"
            )
        if file in ahead and not misplaced:
            raise UserError(
                f"{file}: a config before the command has its options below the command's name; name it after the "
                f"command, as in lit-rlhf {argv[command] if command < len(argv) else 'fit'} --config {file}"
            )
        below = [(key, value) for key, value in tree.value if key.value in misplaced]
        for key, value in below:
            _require_mapping(key, value, file)
        for key, value in [pair for _, options in below for pair in options.value] if below else tree.value:
            if key.value in parts and not value.tag.endswith(":str"):  # text may name a class, or a file
                _require_mapping(key, value, file)
            for option, part in value.value if key.value == "trainer" and isinstance(value, MappingNode) else []:
                check_of_trainer(option.value, part, str(file))


def places(argv: Sequence[str]) -> Iterator[Place]:
    """Each option of the configs of a command line."""
    for file in config_files(argv):
        try:
            tree = read_tree(file)
        except UserError:
            continue  # has been told, or is being told
        yield from _places(tree, file, ())


def configs_first(argv: Sequence[str]) -> list[str]:
    """The same command line with its configs before its other options: what is typed goes before what they say.

    Configs before the command have its options below its name, and stay where they are.
    """
    if not argv or argv[0].startswith("-"):
        return list(argv)
    configs: list[str] = []
    others: list[str] = []
    words = iter(argv[1:])
    for word in words:
        if word in ("-c", "--config"):
            configs += [word, *islice(words, 1)]
        else:
            (configs if word.startswith(("-c=", "--config=")) else others).append(word)
    return [*argv[:1], *configs, *others]


def typed_places(argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Each option of a command line, those of mappings that are written out there too, and its value as in `Place`."""
    trees = dict(_written_out(argv))
    for option, value in _typed(argv):
        yield option, value
        tree = trees.get(option) if value.startswith(("{", "[")) else None
        for part in tree.value if isinstance(tree, SequenceNode) else [tree]:
            if isinstance(part, MappingNode):
                yield from ((place.option, place.value) for place in _places(part, Path(), (option,)))


def _typed(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    for argument, following in pairwise([*argv, ""]):
        option, _, value = argument.partition("=")
        if option.startswith("--"):
            yield option, value if "=" in argument else following


def _written_out(argv: Sequence[str]) -> Iterator[tuple[str, Node]]:
    """Mappings and lists on a command line, as YAML."""
    for option, value in _typed(argv):
        try:
            tree = yaml.compose(value, Loader=LOADER) if value.startswith(("{", "[")) else None
        except (yaml.YAMLError, RecursionError):
            continue  # is answered as what it is not
        if tree is not None:
            yield option, tree


def place_of_option(argv: Sequence[str], name: str, value: str | None = None) -> Place | None:
    """Where an option stands that a message calls by the end of its name.

    Of several it is the one of that value, or the last, which is what holds.
    """
    name = name.replace(".init_args", "")
    found = [place for place in places(argv) if f".{place.option}".endswith(f".{name}")]
    alike = [place for place in found if value is not None and place.value == value]
    whole = [place for place in found if not place.item]
    return (alike or whole)[-1] if found else None


def read_tree(file: Path) -> MappingNode:
    """The mapping that a YAML file holds, with its lines.

    Raises:
        UserError: no file, no YAML, or YAML that means something else than it seems to.
    """
    text = _read_text(file)
    try:
        tree = yaml.compose(text, Loader=LOADER)
    except RecursionError:
        raise UserError(f"{file}: values stand more than {DEEPEST} levels deep in each other") from None
    except yaml.MarkedYAMLError as error:
        if "nesting depth" in str(error):  # as later versions of PyYAML answer
            raise UserError(f"{file}: values stand more than {DEEPEST} levels deep in each other") from None
        raise UserError(_syntax_error(file, text, error)) from None
    except yaml.reader.ReaderError as error:
        place = f"line {1 + text[: error.position].count(chr(10))}"
        raise UserError(
            f"{file}, {place}: a config is text, and this is the control character {error.character!r:.12}"
        ) from None
    if not isinstance(tree, MappingNode) or not tree.value:
        found = {SequenceNode: "a list", ScalarNode: "text"}.get(type(tree), "nothing")
        found = "nothing" if isinstance(tree, ScalarNode) and tree.tag.endswith(":null") else found
        raise UserError(f"{file}: {EXAMPLE}, found {found}")
    _size(tree, file, {}, ())
    _check(tree, file, ())
    return tree


def _read_text(file: Path) -> str:
    if not file.exists():
        near = [file.with_name(name) for name in difflib.get_close_matches(file.name, _beside(file), n=1)]
        near += sorted(CONFIGS.rglob(file.name))  # which come with the package: the current folder may be any
        raise UserError(f"--config: there is no file {file}" + (f"; did you mean {near[0]}?" if near else ""))
    if not file.is_file():
        raise UserError(f"--config: {file} is {'a folder' if file.is_dir() else 'a pipe or a device'}, not a file")
    if file.stat().st_size > LARGEST:
        raise UserError(f"--config: {file} holds {file.stat().st_size / 1e6:.0f} MB, which is no config: is it data?")
    content = file.read_bytes()
    if content.startswith(UTF) or b"\0" in content:
        raise UserError(f"{file} is not text in UTF-8 (it may be UTF-16, or no text); save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + content[: error.start].count(b"\n")
        raise UserError(
            f"{file}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None
    if content.decode(locale.getpreferredencoding(False), "replace") != content.decode():  # as jsonargparse reads it
        line = next(number for number, part in enumerate(content.splitlines(), 1) if not part.isascii())
        raise UserError(f"{file}, line {line}: {UNREADABLE}")
    return text


def _beside(file: Path) -> list[str]:
    folder = file.parent
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _syntax_error(file: Path, text: str, error: yaml.MarkedYAMLError) -> str:
    at, since = error.problem_mark or error.context_mark, error.context_mark
    line = at.line + 1 if at else 1
    if since and since.line + 1 < line:  # what was never closed is mended where it begins
        return f"{file}, line {since.line + 1}: {error.context}: {error.problem} up to line {line}"
    stands = (text.splitlines() or [""])[min(line, len(text.splitlines())) - 1]
    hint = "; quote text that holds ': ' or begins with one of @ % ` * & [ {"
    if "\t" in stands[: len(stands) - len(stands.lstrip())]:
        hint = "; indent by spaces, not by tabs"
    elif error.problem and "document" in error.problem:
        hint = "; is it YAML, and one document?"
    context = f"{error.context}: " if error.context else ""
    return f"{file}, line {line}: {context}{error.problem}{hint}"


def _size(node: Node, file: Path, sizes: dict[int, int], above: tuple[int, ...]) -> int:
    """Values at and below a node, refused where they are too many, too deep, or below themselves."""
    place = f"{file}, line {node.start_mark.line + 1}"
    if id(node) in above:
        raise UserError(f"{place}: an alias stands for what it is part of")
    if len(above) > DEEPEST:
        raise UserError(f"{place}: values stand more than {DEEPEST} levels deep in each other")
    if id(node) not in sizes:
        below = node.value if isinstance(node, SequenceNode) else []
        below = [part for pair in node.value for part in pair] if isinstance(node, MappingNode) else below
        sizes[id(node)] = 1 + sum(_size(part, file, sizes, (*above, id(node))) for part in below)
    if sizes[id(node)] > MOST:
        raise UserError(f"{place}: more than {MOST} values, aliases counted as what they stand for, which is no config")
    return sizes[id(node)]


def _check(node: Node, file: Path, path: tuple[str, ...]) -> None:
    place = f"{file}, line {node.start_mark.line + 1}"
    if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.removeprefix("tag:yaml.org,2002:") not in TAGS:
        raise UserError(f"{place}: the tag {node.tag.replace('tag:yaml.org,2002:', '!!')} makes objects; leave it out")
    if isinstance(node, SequenceNode):
        for part in node.value:
            _check(part, file, path)
            require_named(part, file, path)
    if not isinstance(node, MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, ScalarNode) or (not path and not key.tag.endswith((":str", ":merge"))):
            raise UserError(f"{file}, line {line}: the name of an option is text, found {shown(key)}")
        if key.value in lines:
            raise UserError(f"{file}, line {line}: {key.value} stands in line {lines[key.value]} too; keep one of them")
        lines[key.value] = line
        _check(value, file, (*path, key.value))
        if not path and isinstance(value, SequenceNode):  # options on the command line would take its place unseen
            if key.value in TRAINER:
                raise UserError(f"{file}, line {line}, {key.value}: write it below trainer")
            expected = _a_class(key.value) or "a mapping or a value"
            raise UserError(f"{file}, line {line}, {key.value}: expected {expected}, found a list")
    if "class_path" in lines or (len(path) == 1 and path[0] in PARTS):
        check_class({key.value: value for key, value in node.value}, lines, file, path)


def _require_mapping(key: Node, value: Node, file: Path) -> None:
    if not isinstance(value, MappingNode):
        line = key.start_mark.line + 1
        expected = _a_class(key.value) or "a mapping of options"
        raise UserError(f"{file}, line {line}, {key.value}: expected {expected}, found {shown(value)}")


def _a_class(part: str) -> str:
    return f"a class, such as {{class_path: {PARTS[part]}}}" if part in PARTS else ""


def _places(node: MappingNode, file: Path, path: tuple[str, ...]) -> Iterator[Place]:
    for key, value in node.value:
        if not isinstance(key, ScalarNode):  # a template in braces reads as a mapping whose keys are mappings
            continue
        here = path if key.value == "init_args" else (*path, key.value)
        scalar = value.value if isinstance(value, ScalarNode) else None
        if here != path:
            yield Place(file, key.start_mark.line + 1, ".".join(here), scalar)
        parts = value.value if isinstance(value, SequenceNode) else [value]
        for part in parts:
            if isinstance(part, MappingNode):
                yield from _places(part, file, here)
            elif part is not value and isinstance(part, ScalarNode):
                yield Place(file, part.start_mark.line + 1, ".".join(here), part.value, item=True)
