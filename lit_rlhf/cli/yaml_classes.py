"""Classes that a config names: mappings of class_path and init_args, by themselves or in lists."""

from pathlib import Path

from yaml import MappingNode, Node, ScalarNode, SequenceNode

from lit_rlhf.errors import UserError

IN_ITS_CLASS = {"class_path", "init_args", "dict_kwargs"}
PARTS = {"model": "lit_rlhf.SFT", "data": "lit_rlhf.SFTDataModule"}  # what is a class, with an example
# Options of the Trainer that are classes -> what is expected, with an example.
TRAINER = {
    "callbacks": "a list of callbacks, such as [{class_path: EarlyStopping, init_args: {monitor: val/loss}}]",
    "logger": "true, false, or a logger, such as {class_path: CSVLogger, init_args: {save_dir: runs}}",
    "plugins": "a plugin, such as {class_path: lightning.pytorch.plugins.environments.LightningEnvironment}",
    "profiler": "simple, advanced, or a profiler, such as {class_path: SimpleProfiler, init_args: {filename: times}}",
    "strategy": "a name or a class, such as {class_path: DDPStrategy, init_args: {find_unused_parameters: true}}",
}
SEVERAL = {"callbacks", "logger", "plugins"}  # of these a list may be given


def check_of_trainer(option: str, value: Node, file: str = "") -> None:
    """Refuse a value of an option of the Trainer that is a class where it names none, such as {early_stopping: {...}}.

    Args:
        option: any of the Trainer's.
        value: its value.
        file: that it stands in; empty of one on the command line.

    Raises:
        UserError: says what it is and what is expected.
    """
    if option not in TRAINER:
        return
    several = isinstance(value, SequenceNode) and option in SEVERAL
    for part in value.value if several else [value]:
        whole = part is value and part.tag.endswith((":null", ":bool")) and (option != "callbacks" or _is_null(part))
        if not whole and not _names_a_class(part):
            place = f"{file}, line {part.start_mark.line + 1}, trainer.{option}" if file else f"--trainer.{option}"
            inside = "" if part is value else " in the list"
            raise UserError(f"{place}: expected {TRAINER[option]}, found {shown(part)}{inside}")


def _is_null(node: Node) -> bool:
    return node.tag.endswith(":null")


def _names_a_class(node: Node) -> bool:
    """Whether a value may be a class: by its name, or with its arguments."""
    if isinstance(node, MappingNode):
        return bool(node.value) and {key.value for key, _ in node.value} <= {*IN_ITS_CLASS, "<<"}
    return isinstance(node, ScalarNode) and node.tag.endswith(":str")


def require_named(part: Node, file: Path, path: tuple[str, ...]) -> None:
    """Refuse arguments of no class in a list, whose parts are whole."""
    names = {key.value: key.start_mark.line + 1 for key, _ in part.value} if isinstance(part, MappingNode) else {}
    if "init_args" in names and not names.keys() & {"class_path", "<<"}:
        option = ".".join(step for step in path if step != "init_args")
        raise UserError(
            f"{file}, line {names['init_args']}, {option}: init_args stand without a class_path; name the class above "
            "them"
        )


def check_class(given: dict[str, Node], lines: dict[str, int], file: Path, path: tuple[str, ...]) -> None:
    """Of a class by its import path, with its arguments below `init_args`."""
    option = ".".join(part for part in path if part != "init_args")
    if beside := [name for name in given if name not in (*IN_ITS_CLASS, "<<")]:
        example = "" if "class_path" in given else f", and class_path: {PARTS.get(option, 'its class')} above them"
        raise UserError(
            f"{file}, line {lines[beside[0]]}, {option}: {', '.join(beside)} must stand below init_args{example}"
        )
    named = given.get("class_path")
    if named is not None and not (isinstance(named, ScalarNode) and named.tag.endswith(":str") and named.value):
        raise UserError(
            f"{file}, line {lines['class_path']}, {option}.class_path: expected the import path of a class, such as "
            f"{PARTS.get(option, 'lit_rlhf.SFT')}, found {shown(named)}"
        )
    for arguments in ("init_args", "dict_kwargs"):
        if arguments in given and not isinstance(given[arguments], MappingNode):
            raise UserError(
                f"{file}, line {lines[arguments]}, {option}.{arguments}: expected a mapping of arguments, found "
                f"{shown(given[arguments])}"
            )


def shown(node: Node) -> str:
    """What a node is, in a few words."""
    if isinstance(node, MappingNode):
        names = [str(key.value) for key, _ in node.value if isinstance(key, ScalarNode)]
        return f"a mapping of {', '.join(names)}"[:80] if names else "an empty mapping"
    if isinstance(node, SequenceNode):
        return "a list"
    return "nothing" if _is_null(node) and not node.value else (str(node.value) or "empty text")[:80]
