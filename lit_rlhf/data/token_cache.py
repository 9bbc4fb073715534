"""Rows to tokens, made once and kept on disk by `datasets`.

The key of a cache is what it follows from: the content of files, the tokenizer, the options, and the code that makes
tokens. Files may be put back with the size and the time of others, libraries may be mended.
"""

import functools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import jinja2
import pyarrow as pa
import tokenizers
import transformers
import xxhash
from datasets.exceptions import DatasetGenerationError
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data import steps, tokenize
from lit_rlhf.data.chat import stop_token_ids
from lit_rlhf.data.encoding import require_offsets
from lit_rlhf.data.formats import Kind
from lit_rlhf.data.locating import fingerprint
from lit_rlhf.data.naming import Role, Source
from lit_rlhf.data.plain import as_json
from lit_rlhf.data.reader import Options
from lit_rlhf.data.row_map import RowMap
from lit_rlhf.data.sources import no_rows, place_of, placed_rows
from lit_rlhf.errors import UserError, one_line
from lit_rlhf.files import clear, writing_into

UNDER_WAY = "tmp*"  # names of what `datasets` is still writing
_IDS = datasets.List(datasets.Value("int32"))
_MASK = datasets.List(datasets.Value("bool"))
_OF_PROMPTS = {"status": datasets.Value("uint8"), "control_tokens": _IDS}
_OF_EACH_ROW = {**_OF_PROMPTS, "repeats_prompt": datasets.Value("bool")}
_OF_PAIRS = {"prompt_ids": _IDS, "chosen_ids": _IDS, "rejected_ids": _IDS, "chosen_mask": _MASK, "rejected_mask": _MASK}
FEATURES = {
    "prompts": datasets.Features({"prompt_ids": _IDS, **_OF_PROMPTS}),
    "scored": datasets.Features({"prompt_ids": _IDS, "response_ids": _IDS, **_OF_EACH_ROW}),
    "scored_steps": datasets.Features({"prompt_ids": _IDS, "response_ids": _IDS, "step_ends": _IDS, **_OF_EACH_ROW}),
    "sft": datasets.Features({"input_ids": _IDS, "loss_mask": _MASK, **_OF_EACH_ROW}),
    "preference": datasets.Features({**_OF_PAIRS, "margin": datasets.Value("float32"), **_OF_EACH_ROW}),
    "unpaired": datasets.Features({**_OF_PAIRS, **_OF_EACH_ROW}),
    "stepwise": datasets.Features(
        {"prompt_ids": _IDS, "response_ids": _IDS, "step_ends": _IDS}
        | {"labels": datasets.List(datasets.Value("float32")), **_OF_EACH_ROW}
    ),
}


FUNCTIONS: dict[Kind, Any] = {
    "prompts": tokenize.tokenize_prompts,
    "scored": tokenize.tokenize_scored,
    "sft": tokenize.tokenize_sft,
    "preference": tokenize.tokenize_preference,
    "unpaired": tokenize.tokenize_unpaired,
    "stepwise": steps.tokenize_stepwise,
    "scored_steps": steps.tokenize_scored_steps,
}


def tokenized(
    source: Source,
    kind: Kind,
    role: Role,
    tokenizer: PreTrainedTokenizerBase,
    options: Options,
    num_proc: int | None,
) -> datasets.Dataset:
    """All rows of a source as token ids and status, whether they can be used or not; args as of `load_examples`."""
    if next(placed_rows(source, kind, role), None) is None:
        raise no_rows(source, kind)
    held = fingerprint(source, role)
    key = hash_of([held, kind, str(source.format), str(source.side), *map(str, sorted(source.columns.items()))])
    rows = cached_rows(lambda: _json_rows(source, kind, role, held), key)
    return tokenized_rows(rows, functools.partial(place_of, source, kind, role), kind, tokenizer, options, num_proc)


def tokenized_rows(
    rows: datasets.Dataset,
    place: Callable[[int], str],
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    options: Options,
    num_proc: int | None,
) -> datasets.Dataset:
    """Rows as token ids and status.

    Args:
        rows: of `cached_rows`.
        place: where row i comes from, for what is to be said of it.
        kind: what they become.
        tokenizer: as of `load_examples`, like what follows.
        options: of tokenisation.
        num_proc: processes that tokenise.

    Raises:
        UserError: a row that cannot be tokenised, with its place.
    """
    how = json.dumps(options._asdict(), sort_keys=True, default=str)
    key = hash_of([rows._fingerprint, kind, how, *_tokenizer_key(tokenizer)])
    row_map = RowMap(
        functools.partial(_tokenize_json, function=FUNCTIONS[kind], place=place, tokenizer=tokenizer, options=options),
        FEATURES[kind],
        Path(rows.cache_files[0]["filename"]).with_name(f"cache-{key}.arrow"),
        place,
    )
    tokenize_all = functools.partial(row_map.find_or_make, rows, None if num_proc is None else min(num_proc, len(rows)))

    def tokenize_anew() -> datasets.Dataset:
        for file in row_map.files:
            file.unlink()
        return tokenize_all()

    with _writing_into(row_map.file.parent):
        return _found_or_made(bool(row_map.files), tokenize_all, tokenize_anew)


def cached_rows(rows: Callable[[], Iterator[str]], key: str) -> datasets.Dataset:
    """Rows as JSON in one column: messages of any shape fit, and Arrow infers nothing.

    Args:
        rows: reads them, if the cache has none.
        key: of all that they follow from.

    Raises:
        UserError: what reading them raised.
    """
    read = functools.partial(
        datasets.Dataset.from_generator,
        lambda: ({"row": row} for row in rows()),
        features=datasets.Features({"row": datasets.Value("large_string")}),
        fingerprint=key,
    )
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "generator" / f"default-fingerprint={key}"

    def read_anew() -> datasets.Dataset:
        shutil.rmtree(folder)
        return read()

    return _found_or_made(any(folder.glob("*/dataset_info.json")), read, read_anew)


@contextmanager
def _writing_into(folder: Path) -> Iterator[None]:
    """Clear a folder of the cache of what a dead process left half written, and, if it fails, of what this one has."""
    try:
        with writing_into(folder, UNDER_WAY):
            yield
    except BaseException:
        clear(folder, UNDER_WAY)
        raise


# What is raised of files that are cut or empty; then of such as lack names or have others.
UNREADABLE = (pa.ArrowException, OSError, json.JSONDecodeError, AttributeError, KeyError, TypeError)


def _found_or_made(
    is_held: bool, find_or_make: Callable[[], datasets.Dataset], make_anew: Callable[[], datasets.Dataset]
) -> datasets.Dataset:
    """What the cache holds, or is given now; made anew where what it holds is damaged."""
    try:
        try:
            return find_or_make()
        except UNREADABLE as error:
            if not is_held:
                raise
            rank_zero_warn(f"what the cache of tokens holds cannot be read ({one_line(error, 300)}); it is made anew")
            return make_anew()
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, OSError):
            raise _cannot_be_written(error.__cause__) from error
        raise
    except OSError as error:
        raise _cannot_be_written(error) from error
    except ValueError as error:  # `datasets` closes what the disk had no room for a second time
        if isinstance(error.__context__, OSError) and not isinstance(error, UserError):
            raise _cannot_be_written(error.__context__) from error
        raise


def _cannot_be_written(error: OSError) -> UserError:
    return UserError(
        f"the cache of tokens in {datasets.config.HF_DATASETS_CACHE} cannot be written ({one_line(error, 300)}); set "
        "$HF_DATASETS_CACHE to a folder with room that can be"
    )


def hash_of(parts: Iterable[str]) -> str:
    """A key of the cache: of texts, and of the code that makes tokens of files, which is ours and its libraries'."""
    digest = xxhash.xxh3_128(_code())
    for part in parts:
        data = part.encode()
        digest.update(b"%d " % len(data))  # where one ends and the next begins
        digest.update(data)
    return digest.hexdigest()


@functools.cache
def _code() -> bytes:
    versions = f"{transformers.__version__} {tokenizers.__version__} {jinja2.__version__}".encode()
    return b"".join([versions, *(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))])


def _json_rows(source: Source, kind: Kind, role: Role, held: str) -> Iterator[str]:
    for place, row in placed_rows(source, kind, role):
        yield as_json(row, place)
    if fingerprint(source, role) != held:
        raise UserError(f"{source.name}: it changed while it was read; start again when nothing writes to it")


def _tokenize_json(
    rows: Sequence[str],
    numbers: Sequence[int],
    function: Callable[..., dict[str, Any]],
    place: Callable[[int], str],
    tokenizer: PreTrainedTokenizerBase,
    options: Options,
) -> dict[str, Any]:
    parsed = [json.loads(row) for row in rows]
    try:
        return function(parsed, tokenizer, options)
    except (UserError, RecursionError):
        stop_token_ids(tokenizer)  # a template that is not valid is no row's fault
        for number, row in zip(numbers, parsed, strict=True):
            try:
                function([row], tokenizer, options)
            except UserError as error:
                raise UserError(f"{place(number)}: {error}") from error
            except RecursionError as error:
                raise UserError(f"{place(number)}: nested too deep for the chat template; leave out what is") from error
        raise


def _tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    require_offsets(tokenizer)
    # What a call leaves behind in the backend changes nothing here.
    state = {**json.loads(tokenizer.backend_tokenizer.to_str()), "truncation": None, "padding": None}
    return [
        json.dumps(state, sort_keys=True),
        str(tokenizer.chat_template),
        str(sorted(tokenizer.special_tokens_map.items())),
    ]
