"""Reference log-probs of rows, computed once and kept on disk for every run that would compute the same.

The key is a hash of all that the numbers follow from: the weights and the config of the reference, the token ids of
every row (what tokenizer, chat template and data come to), the ids without a token, the precision, the code of the
model and the versions of torch and transformers. Work under way is kept in parts, and taken up where a killed run left
it. Files are written aside and renamed: runs may share them. Each carries the hash of its numbers: what is damaged is
computed anew.

Axes: n rows of a split, each of two responses: chosen and rejected, or as `ReferencedModule.row_logprobs` says.
"""

import hashlib
import inspect
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_rlhf.engine.sharding import full_state_dict
from lit_rlhf.errors import UserError
from lit_rlhf.files import replacing
from lit_rlhf.models.adapter_exports import own_weights
from lit_rlhf.models.adapter_folders import plain_config
from lit_rlhf.models.roles import SameBase

VERSION = 2  # raise it when the same key would no longer give the same numbers
SECONDS_PER_PART = 60.0  # what a killed run loses at most
NOT_WEIGHTS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
RowLogprobs = Callable[[Any], Tensor]


class ReferenceCache:
    """Split -> (n, 2) float32 log π_ref of the responses of each row, on the device that trains.

    Args:
        known: what a checkpoint brought along, by the fingerprint of the rows: those of other rows are never used.
    """

    def __init__(self, known: dict[str, Tensor] | None = None) -> None:
        self.by_rows = known or {}  # on the CPU, as checkpoints carry it
        self.by_split: dict[str, Tensor] = {}

    def __getitem__(self, split: str) -> Tensor:
        return self.by_split[split]

    def fill(
        self,
        trainer: Trainer,
        reference: SameBase,
        splits: Sequence[str],
        row_logprobs: RowLogprobs,
        is_reference: bool = True,
        read_as: str = "",
    ) -> None:
        """Take the log-probs of splits from memory or disk, or compute what is missing, each rank doing its share.

        Args:
            trainer: its data module deals the rows.
            reference: the policy, with the adapters on that make it the reference.
            splits: train, val or test; for one without rows nothing happens.
            row_logprobs: (B, 2) log-probs of the rows of a batch.
            is_reference: whether it still is the reference; without adapters it is not once the policy has learnt.
            read_as: how the log-probs of a row are not the sums over its responses.

        Raises:
            UserError: it is not, and rows are new.
        """
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        source = ""
        for split in splits:
            loader = data.rows_dataloader(split)
            if loader is None:
                continue
            rows = data.rows_fingerprint(split) + read_as
            if rows not in self.by_rows:
                if not is_reference:
                    raise UserError(
                        f"cache_reference: there are no reference log-probs of these {split} rows, and the policy that "
                        "gave those of other rows has learnt since; set cache_reference: false and name the model that "
                        "the run started from as model.reference"
                    )
                source = source or source_hash(reference, trainer)  # once: it reads all weights
                file = cache_folder() / f"{hashlib.sha256(f'{source} {rows}'.encode()).hexdigest()}.safetensors"
                self.by_rows[rows] = self._find(trainer, split, loader, file, row_logprobs)
            elif not are_whole(self.by_rows[rows], data.num_rows(split)):
                raise UserError(
                    f"ckpt_path: the reference log-probs of the {split} rows in the checkpoint are damaged: not one "
                    "finite number for each response; resume from another checkpoint"
                )
            self.by_split[split] = self.by_rows[rows].to(trainer.lightning_module.device)

    def _find(self, trainer: Trainer, split: str, loader: Any, file: Path, row_logprobs: RowLogprobs) -> Tensor:
        """(n, 2) from disk, or computed and written there."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        found = read(file)
        if found is not None and not are_whole(found["logprobs"], data.num_rows(split)):
            found = None
        # What one rank sees on its disk decides for all: they must agree on whether to compute.
        if trainer.strategy.reduce_boolean_decision(found is not None, all=True) and found is not None:
            rank_zero_info(f"reference log-probs of {len(found['logprobs'])} {split} rows are in {file}")
            return found["logprobs"]
        rank_zero_info(f"computing reference log-probs of {data.num_rows(split)} {split} rows")
        mine = self._compute(trainer, loader, data.num_rows(split), Parts(file.with_suffix(".parts")), row_logprobs)
        logprobs: Tensor = trainer.strategy.reduce(mine, reduce_op="sum").cpu()
        if not are_whole(logprobs, data.num_rows(split)):
            bad = logprobs.isfinite().all(dim=1).logical_not().nonzero()[:, 0].tolist()
            raise UserError(
                f"cache_reference: the log-probs of {len(bad)} of {len(logprobs)} {split} rows are not finite (the "
                f"first is row {bad[0] + 1}): the policy holds weights that are not, or overflows in "
                f"trainer.precision ({trainer.precision})"
            )
        if trainer.is_global_zero:
            try:
                write({"logprobs": logprobs}, file)
                shutil.rmtree(file.with_suffix(".parts"), ignore_errors=True)
            except (OSError, SafetensorError) as error:  # this run has them, and other ranks wait for this one
                rank_zero_warn(
                    f"the reference log-probs cannot be kept in {file} ({error}); this run goes on with them, another "
                    "will compute them again; set $LIT_RLHF_CACHE to a folder with room that can be written"
                )
        return logprobs

    @torch.no_grad()
    def _compute(
        self, trainer: Trainer, loader: Any, num_rows: int, parts: "Parts", row_logprobs: RowLogprobs
    ) -> Tensor:
        """(n, 2) with the rows of this rank, 0 elsewhere."""
        module: Any = trainer.lightning_module
        known = parts.load(num_rows)
        mine = torch.zeros(num_rows, 2, device=module.device)
        for host_batch in loader:
            rows = host_batch.row_ids
            held = known[rows]
            # Decided by all ranks together: their parts may differ, and under FSDP2 they forward together or hang.
            if trainer.strategy.reduce_boolean_decision(not held.isnan().any(), all=True):
                mine[rows.to(mine.device)] = held.to(mine.device)
                continue
            batch = module.transfer_batch_to_device(host_batch, module.device, 0)
            with trainer.precision_plugin.forward_context():
                values = row_logprobs(batch)
            mine[batch.row_ids] = values
            parts.add(rows, values)
        parts.flush()
        return mine


class Parts:
    """Results of a computation under way, in files that any number of ranks and runs may add to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.since = time.monotonic()

    def load(self, num_rows: int) -> Tensor:
        """(n, 2) what is there, NaN elsewhere."""
        known = torch.full((num_rows, 2), float("nan"))
        for file in self.folder.glob("*.safetensors"):
            part = read(file)
            if part is not None and are_whole(part["logprobs"], len(part["rows"])):
                known[part["rows"]] = part["logprobs"]
        return known

    def add(self, rows: Tensor, logprobs: Tensor) -> None:
        """Keep (B, 2) log-probs of (B,) rows; on disk once in a while."""
        self.pending.append((rows, logprobs))
        if time.monotonic() - self.since >= SECONDS_PER_PART:
            self.flush()

    def flush(self) -> None:
        """Write what is pending; a part that cannot be written costs a killed run time, and no other run anything."""
        if self.pending:
            rows, logprobs = (torch.cat([x.cpu() for x in column]) for column in zip(*self.pending, strict=True))
            with suppress(OSError, SafetensorError):  # another run is done, and clears the folder meanwhile
                write({"rows": rows, "logprobs": logprobs}, self.folder / f"{uuid.uuid4().hex}.safetensors")
        self.pending, self.since = [], time.monotonic()


def cache_folder() -> Path:
    """Where log-probs are kept: $LIT_RLHF_CACHE, or a folder of the user's cache."""
    base = os.environ.get("LIT_RLHF_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "lit_rlhf")
    return Path(base).expanduser() / "reference"


def source_hash(reference: SameBase, trainer: Trainer) -> str:
    """Hash of all but the rows that the log-probs follow from; every rank must call it, and gets that of rank 0."""
    policy = reference.policy
    weights, adapters = reference_weights(full_state_dict(policy.model), reference.adapters), []
    if reference.adapters:
        adapters = [plain_config(policy.model.peft_config[name]) for name in reference.adapters] + [version("peft")]
    config = {name: value for name, value in policy.model.config.to_dict().items() if name not in NOT_WEIGHTS}
    code = inspect.getsource(sys.modules[type(policy.model).__module__])  # mended, or come with the weights
    unused = [] if policy.unused_ids is None else policy.unused_ids.tolist()
    made_by = [VERSION, config, unused, str(trainer.precision), torch.__version__, transformers.__version__, code]
    made_by += adapters
    held = tensors_hash(weights) if trainer.is_global_zero else ""
    digest = hashlib.sha256(json.dumps([*made_by, held], default=str).encode())
    return str(trainer.strategy.broadcast(digest.hexdigest()))


def reference_weights(weights: dict[str, Tensor], adapters: Sequence[str]) -> dict[str, Tensor]:
    """Those that the reference computes with: the base by its own names, and of the adapters those that are on."""
    base = {name.replace(".base_layer.", "."): tensor for name, tensor in weights.items() if ".lora_" not in name}
    held = [own_weights(weights, name) for name in adapters]
    return base | {f"{number}.{name}": w for number, one in enumerate(held) for name, w in one.items()}


def are_whole(logprobs: Tensor, num_rows: int) -> bool:
    """Whether these are (n, 2) finite numbers."""
    return logprobs.shape == (num_rows, 2) and bool(logprobs.isfinite().all())


def read(file: Path) -> dict[str, Tensor] | None:
    """The tensors of a file as they were written; None if it is not there, or is damaged, which is said."""
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            if (opened.metadata() or {}).get("sha256") == tensors_hash(tensors):
                return tensors
        why = "its numbers are not those that were written"
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        why = str(error)
    rank_zero_warn(f"{file}: damaged ({why}); what it held is computed anew")
    return None


def write(tensors: dict[str, Tensor], file: Path) -> None:
    """Write what another run may be writing as well."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(file, shared=True) as aside:
        save_file(whole, aside, metadata={"sha256": tensors_hash(whole)})


def tensors_hash(tensors: dict[str, Tensor]) -> str:
    """Hash of names, types, shapes and numbers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
