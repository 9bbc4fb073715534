"""The Hugging Face hub where it answers; where it does not, what it gave before, without a minute of retries."""

import codecs
import functools
import json
import re
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import datasets
from huggingface_hub import HfApi, constants, get_session

from lit_rlhf.errors import UserError, looks_like_a_path
from lit_rlhf.files import heal

DEMO_MODEL = Path(__file__).parents[1] / "demo" / "model"
SECONDS = 5.0  # that the hub may take to answer
LONGEST = 200  # characters of an error that are told
POINTER = b"version https://git-lfs.github.com/spec/"
READ = (".json", ".safetensors", ".jinja", ".model", ".txt")  # endings of a model's files
MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")  # what can be the name of something there


@contextmanager
def hub_or_cache(name: str) -> Iterator[str]:
    """Where what is loaded by name may come from: the hub, or its cache alone while the hub cannot be reached.

    The libraries ask the hub for each file, five times over with growing pauses, before they look into the cache.

    Args:
        name: what is to be loaded; nothing is asked for a file or folder that is there.

    Yields:
        Why the hub is not asked, for an error's message; nothing where it answers.
    """
    if Path(name).exists() or (not constants.is_offline_mode() and answers(constants.ENDPOINT)):
        yield ""
        return
    switches = [(constants, constants.HF_HUB_OFFLINE), (datasets.config, datasets.config.HF_HUB_OFFLINE)]
    why = (
        "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else f"the hub ({constants.ENDPOINT}) cannot be reached"
    )
    try:
        for module, _ in switches:
            module.HF_HUB_OFFLINE = True
        yield why
    finally:
        for module, before in switches:
            module.HF_HUB_OFFLINE = before


def answers(endpoint: str) -> bool:
    """Whether the hub can be reached; asked once a minute at most."""
    return _answers(endpoint, int(time.monotonic() // 60))


@functools.lru_cache(maxsize=4)
def _answers(endpoint: str, minute: int) -> bool:
    try:
        return bool(get_session().head(endpoint, timeout=SECONDS).status_code < 500)
    except Exception:  # which errors there are is the affair of the hub's HTTP client, which has changed twice
        return False


def resolve(name: str | Path) -> str:
    """The folder or hub name that a user means by a model's name.

    Raises:
        UserError: it can be neither.
    """
    if str(name) == "demo":
        return str(DEMO_MODEL)
    try:
        path = Path(name).expanduser()
        heal(path)  # an export that was killed between two names
        is_there, is_folder = path.exists(), path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, with a zero byte, or of ~nobody
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{str(name)[:80]!r} cannot be the name of a model ({why})") from error
    if not str(name) or (is_there and not is_folder):
        raise UserError(
            f"{str(name)!r}: no model could be loaded there: expected a folder with config.json and model.safetensors, "
            f"or a name on the Hugging Face hub; {of_file(path) if str(name) else 'this is no name'}"
        )
    if not is_there and (looks_like_a_path(str(name)) or not HUB_NAME.fullmatch(str(name))):
        raise UserError(f"{name}: no model could be loaded there: there is no folder {path.absolute()}")
    if is_there:
        with suppress(PermissionError):  # who reads the folder says so
            require_fetched(path, name)
    return str(path) if is_there else str(name)


def of_file(path: Path) -> str:
    """What to name in place of a file."""
    if path.suffix == ".ckpt":
        return f"this is a checkpoint: lit-rlhf export --ckpt_path={path} --folder=model writes a folder of it"
    is_model = (path.parent / "config.json").is_file()
    return f"this is a file in the folder {path.parent}: name that" if is_model else "this is a file"


def require_fetched(folder: Path, name: str | Path) -> None:
    """Refuse a folder in which Git LFS has left its pointers in place of files that are to be read.

    Args:
        folder: of a model.
        name: for messages.

    Raises:
        UserError: names the first of them.
    """
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    read = READ if any(path.suffix == ".safetensors" for path in files) else (*READ, ".bin")
    for path in files:
        if path.suffix in read and path.stat().st_size < 1024 and path.read_bytes().startswith(POINTER):
            raise UserError(
                f"{name}: {path.name} is a pointer of Git LFS, not the file itself: fetch it there (git lfs pull)"
            )


def require_no_mark(file: Path, name: str | Path) -> None:
    """Refuse a text of a model's that begins with a byte order mark, which transformers takes for a part of it.

    Args:
        file: that is there.
        name: of the model, for messages.

    Raises:
        UserError: it does.
    """
    with file.open("rb") as content:
        if content.read(4).startswith(MARKS):
            raise UserError(
                f"{name}: {file.name} begins with a byte order mark: save it as UTF-8 without one, as transformers "
                "reads it"
            )


def require_json(source: str, name: str | Path, *files: str) -> None:
    """Refuse a folder with damaged settings: transformers passes over some, and stumbles over others unnamed.

    Args:
        source: folder, or a hub name, of which nothing is looked at.
        name: for messages.
        files: that hold an object in JSON where they are there.

    Raises:
        UserError: one of them does not.
    """
    for file in files:
        path = Path(source) / file
        if not path.is_file():
            continue
        require_no_mark(path, name)
        try:
            held, why = json.loads(path.read_bytes()), "it is another value"
        except (ValueError, RecursionError) as error:
            held, why = None, str(error)
        if not isinstance(held, dict):
            raise UserError(f"{name}: {file} is damaged, copy it anew: expected an object in JSON ({why})")


def hint(source: str, error: Exception) -> str:
    """What the user may have overlooked where nothing could be loaded."""
    if "trust_remote_code=True" in str(error):
        return "; if you trust that code, set trust_remote_code: true"
    if source == str(DEMO_MODEL):
        return "; the embedded demo model has no weights: SFT trains it with from_scratch: true, and exports a policy"
    if Path(source).is_dir():
        below = sorted(Path(source).glob("*/config.json"))
        if below and not (Path(source) / "config.json").exists():  # a run's folder, or one of several models
            models = [path.parent for path in below]
            return f"; is it {' or '.join(map(str, models[:3]))}?"
        return f"; the folder holds {sorted(p.name for p in Path(source).iterdir())[:8]}"
    return f"; there is no folder {Path(source).absolute()}"


def first_line(error: Exception) -> str:
    """What an error says first: further lines repeat it in other words, unless the first only announces them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["without a word"]
    said = lines[0].removesuffix(" from one of:")  # what could be is in further lines
    said = f"{said} {lines[1]}" if said.endswith(":") and len(lines) > 1 else said
    said = said if len(said) <= LONGEST else f"{said[:LONGEST]}..."
    return said if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {said}"


def in_transformers(error: Exception) -> bool:
    """Whether an error came up while transformers read the files of a model: whatever it is, it is about these."""
    return any(
        frame.f_globals.get("__name__", "").startswith("transformers.")
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def push(folder: Path, repo: str, private: bool | None = None) -> str:
    """Upload a folder to a repository of models on the hub, which is made where there is none.

    Args:
        folder: of an export.
        repo: owner/name.
        private: whether only its owner sees a repository that is made; None = as the owner's account has it.

    Returns:
        Where it is now.

    Raises:
        UserError: the hub's client refuses, or does not reach it; the folder stays.
    """
    try:
        hub = HfApi()
        hub.create_repo(repo, private=private, exist_ok=True)
        return str(hub.upload_folder(repo_id=repo, folder_path=folder))
    except Exception as error:  # of the client's HTTP library it may be any, see `_answers`
        raise UserError(
            f"push: {repo} was not uploaded ({first_line(error)}); {folder} is there: log in by `hf auth login`, and "
            f"then `hf upload {repo} {folder}`"
        ) from error
