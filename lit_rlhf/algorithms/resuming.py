"""What a checkpoint says, what is refused of one, and how a run goes on from it."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from lit_rlhf.algorithms.checkpoint import require_facts, require_location
from lit_rlhf.algorithms.hyperparameters import differing, plain, read_arguments, restored_arguments
from lit_rlhf.algorithms.learning import LearningModule
from lit_rlhf.algorithms.optimizers import LEARNT, learnt_by, require_read_state
from lit_rlhf.algorithms.resumed_state import (
    moments_of,
    pieces_of,
    reopen_cut_epoch,
    require_callbacks,
    require_epochs,
    require_finite,
    require_loops,
    require_same_adapter,
    require_same_shapes,
    require_state,
    warn_of_rounded,
)
from lit_rlhf.errors import UserError, named_by, one_line, require_types
from lit_rlhf.models.fingerprints import Fingerprints, require_same

# Arguments that name what a run stands on or where it is held; the weights themselves are looked at.
PLACES = (
    "policy",
    "reference",
    "critic",
    "teacher",
    "lora",
    "merge_start",
    "hold_reference",
    "hold_critic",
    "generation",
)


class ResumableModule(LearningModule):
    """A module whose run goes on from a checkpoint as if it had not ended."""

    tokenizer: PreTrainedTokenizerBase

    def __init__(self) -> None:
        super().__init__()
        self.loader_states: list[dict[str, Any]] = []  # of a checkpoint, until training goes on
        self.has_learnt = False  # whether its weights may be others than those it was made with
        self.pieces_unread = False  # whether weights and optimiser come from a sharded checkpoint
        self.untrained: str | None = None  # what is random in the network that predicts, and what to do about it

    def views(self) -> dict[str, Any]:
        """The roles and where they live: networks, views of `roles.py`, or a word for what is neither."""
        return {self.exported: getattr(self, self.exported)}

    def stands_on(self) -> dict[str, Fingerprints]:
        """By role, the folders whose weights no checkpoint holds, with the fingerprints of what was read from them."""
        return {role: getattr(view, "stands_on", {}) for role, view in self.views().items()}

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """A module as a run's checkpoint holds it: with the run's arguments, weights and chat template.

        Args:
            checkpoint_path: a file; the model that its run started from must be where it was, for tokenizer and config.
            map_location: as in `torch.load`.
            hparams_file: YAML with the arguments, in place of those in the checkpoint.
            strict: whether weights may be missing or left over.
            weights_only: as in `torch.load`; None = True.
            kwargs: arguments of the constructor in place of the run's; `trust_remote_code` is never the run's, and
                functions and objects are only where they are this library's.

        Raises:
            UserError: it is of another algorithm, sharded, or does not say all that the constructor asks for; an
                argument that is none.
        """
        named = {"hparams_file": hparams_file, "strict": strict, "weights_only": weights_only}
        require_types(cls.load_from_checkpoint, {"checkpoint_path": checkpoint_path, **named})
        require_location(map_location)
        facts = require_facts(Path(checkpoint_path), cls.__name__)
        stored = facts.get("hyper_parameters", {}) | (read_arguments(Path(hparams_file)) if hparams_file else {})
        arguments = restored_arguments(cls, {name: value for name, value in stored.items() if name not in kwargs})
        guards = {"trust_remote_code": False, "_instantiator": None}  # whatever the file may say
        module = super().load_from_checkpoint(
            checkpoint_path, map_location, None, strict, weights_only is not False, **(guards | arguments | kwargs)
        )
        module.tokenizer.chat_template = facts.get("chat_template", module.tokenizer.chat_template)
        return module

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say whose checkpoint it is, and what its export needs beside weights."""
        checkpoint["algorithm"] = type(self).__name__
        checkpoint["exported"] = self.exported
        checkpoint["optimizer_options"] = self.optimizer_options()
        checkpoint[LEARNT] = learnt_by(checkpoint)
        origin = getattr(self, self.exported).origin
        checkpoint["adapter"] = None if origin is None else asdict(origin)
        checkpoint["stands_on"] = self.stands_on()
        checkpoint["tokens"] = len(self.tokenizer)
        checkpoint["chat_template"] = self.tokenizer.chat_template  # may be the data's

    @property
    def resumed_file(self) -> str:
        """The checkpoint that is taken up, in words."""
        return "the checkpoint" if self._trainer is None else str(self.trainer.ckpt_path)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another algorithm, or on other weights than are in the folders that it stood on.

        Where the data stood is kept, see `on_train_start`.
        """
        mine, theirs, file = type(self).__name__, checkpoint.get("algorithm"), self.resumed_file
        if theirs not in (None, mine):
            raise UserError(
                f"ckpt_path: {file} is of {theirs}, this run is of {mine}; resume the same config, or start "
                f"{mine} from the model that {theirs} exported, by model.policy"
            )
        if "adapter" in checkpoint:
            require_same_adapter(checkpoint["adapter"], getattr(self, self.exported).origin, file)
        here = self.stands_on()
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING:
            here = {self.exported: here[self.exported]}  # nothing else has a say
        require_same(checkpoint.get("stands_on", {}), here, self.exported, file)
        weights = checkpoint.get("state_dict", {})  # none where each rank reads its own shard
        held = self.state_dict()
        require_same_shapes(weights, held, file)
        require_state(checkpoint, file)
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            require_loops(checkpoint["loops"]["fit_loop"], self.trainer.fit_loop.state_dict(), file)
            reopen_cut_epoch(checkpoint["loops"]["fit_loop"])
            require_epochs(checkpoint["loops"]["fit_loop"], self.trainer.max_epochs, file)
            require_callbacks(checkpoint.get("callbacks", {}), self.trainer.callbacks, file)  # type: ignore[attr-defined]
            warn_of_rounded(weights, held, file)
            self.note_changes(checkpoint, file)
            self.tell_changed_settings(checkpoint.get("hyper_parameters", {}), file)
            self.resumed, self.pieces_unread = checkpoint, not weights
        require_finite({**weights, **moments_of(checkpoint)}, file)
        self.has_learnt = True
        self.loader_states = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
        self.untrained = None

    def tell_changed_settings(self, given: Any, file: str) -> None:
        """Say which settings are other than in a checkpoint's run, beside those of the optimiser and what it stands on.

        Args:
            given: arguments of that run, as a checkpoint keeps them.
            file: of the checkpoint.
        """
        if not isinstance(given, Mapping):
            return
        told_apart = {*PLACES, *self.optimizer_options()}
        mine = {name: plain(value) for name, value in self.hparams.items() if name not in told_apart}
        if changed := differing(given, mine):
            told = ", ".join(f"{name} {one_line(now)} (it was {one_line(was)})" for name, (was, now) in changed.items())
            rank_zero_info(f"ckpt_path: settings of this run are other than in the run of {file}: {told}")

    def on_train_start(self) -> None:
        """Put training data back to where the checkpoint was taken; learn at a rate that was found.

        Lightning does the first when it sets up the loader; but `estimated_stepping_batches` sets it up for the
        schedule before the checkpoint's loops are restored, and then it does not.
        """
        self.has_learnt = True
        for state in self.loader_states:
            with named_by(f"ckpt_path: {self.resumed_file}"):
                self.trainer.train_dataloader.load_state_dict(state)  # type: ignore[union-attr]
        if self.pieces_unread:  # each rank has read its own, past `on_load_checkpoint`
            require_finite(pieces_of(self, self.trainer.optimizers), self.resumed_file)
            for optimizer in self.trainer.optimizers if self.made else ():
                require_read_state(optimizer, self.made, self.global_step, self.resumed_file)
        self.loader_states, self.untrained, self.pieces_unread = [], None, False
        self.take_own_options(self.resumed_file)
        self.take_found_rate()
