"""What the algorithms share: the policy and its tokenizer, frozen networks, sharding, exports."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import FrameType
from typing import Any, ClassVar, Literal, cast

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.parsing import collect_init_args
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.algorithms.hyperparameters import plain_arguments
from lit_rlhf.algorithms.lightning_tools import require_monitors, require_validation, warn_of_rounding
from lit_rlhf.algorithms.resuming import ResumableModule
from lit_rlhf.algorithms.samples import Sample, examples_of, read_samples, with_known_completions
from lit_rlhf.algorithms.self_comparison import warn_of_itself
from lit_rlhf.algorithms.settings import OptimizerSettings
from lit_rlhf.algorithms.strategies import (
    check_strategy,
    check_tensor_parallel,
    cuts_networks,
    holds_pieces,
    tell_read_whole,
)
from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.data.batching import as_it_is
from lit_rlhf.data.chat import stop_token_ids
from lit_rlhf.data.checks import require_batch
from lit_rlhf.data.formats import Kind
from lit_rlhf.engine.packing import PackedBatch
from lit_rlhf.engine.sharding import full_state_dict, shard
from lit_rlhf.errors import UserError, hints_of, require, require_kinds
from lit_rlhf.models.holding import FrozenDtype, require_frozen_dtype, require_precision
from lit_rlhf.models.network import Network
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.roles import OwnModel
from lit_rlhf.models.saving import Artefact, ScoreHead, artefact
from lit_rlhf.models.tokens import keep_to_tokens
from lit_rlhf.rollout.best_of import BestOf
from lit_rlhf.rollout.play import (
    GenerationSettings,
    complete,
    episode_rows,
    room_for_response,
)

NO_REFERENCE = "none"  # of a method that could have one


class AlignmentModule(ResumableModule):
    """Base of SFT, RewardModel, PPO, DPO and KTO.

    The constructor of a subclass calls this one, then sets `tokenizer` and the network that `exported` names
    (`load_policy_with_tokenizer` makes both), and `generation` where the default does not suit. The class says what it
    `learns_from`, and defines `training_step` and `evaluate`.

    Where the config of a mixture of experts asks for a load-balancing loss (`output_router_logits`, and a coefficient),
    each network that learns adds that term, as transformers computes it, to its loss.

    Args:
        learning_rate: peak learning rate of AdamW.
        weight_decay: decoupled decay of matrices; norms, biases and other vectors are not decayed.
        adam_betas: decay rates of AdamW's moments.
        adam_eps: AdamW's epsilon.
        lr_scheduler: what follows the warm-up: constant, or a cosine or linear fall to 0 at the last step.
        warmup_steps: optimiser steps of linear warm-up; below 1, that share of all steps.
        optimizer: adamw, or adamw_8bit: moments of one byte each, but for embeddings, by bitsandbytes.
        frozen_dtype: what weights that never learn are held in: float32, bfloat16, or nf4 (4 bits, by bitsandbytes; of
            a base under an adapter, or of a reference that is named); null = as the trainer's precision holds all.
        activation_checkpointing: keep the inputs of blocks alone for the backward pass, and compute each block again
            there: a third more work, and a fraction of the memory of activations.
    """

    learns_from: ClassVar[Kind]  # what the rows of its data are
    predicts_from: ClassVar[Kind] = "prompts"
    exported: ClassVar[str] = "policy"  # the network that this stage is about
    tokenizer: PreTrainedTokenizerBase
    policy: Policy
    generation: GenerationSettings = GenerationSettings()  # how `predict` and the sample tables write completions
    best_of: BestOf = BestOf()  # of how many completions `predict` writes which

    def __init__(
        self,
        learning_rate: float = 1e-5,
        weight_decay: float = 0.0,
        adam_betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
        lr_scheduler: Literal["constant", "cosine", "linear"] = "cosine",
        warmup_steps: float = 0.0,
        optimizer: Literal["adamw", "adamw_8bit"] = "adamw",
        frozen_dtype: FrozenDtype | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        # What the constructor that was called got: bases may get arguments that are made of these.
        *_, given = collect_init_args(cast(FrameType, inspect.currentframe()), [], classes=(AlignmentModule,))
        inits = [vars(base).get("__init__") for base in reversed(type(self).__mro__)]
        # Before Lightning compares them with each other, which arrays cannot be.
        require_kinds({name: hint for init in inits for name, hint in hints_of(init).items()}, given)
        for role in ("policy", "reference", "critic"):
            require(given.get(role) != "", f"model.{role}", "empty text", "a model's folder, or its name on the hub")
        self.save_hyperparameters(plain_arguments(given))
        self.optimizer_settings = OptimizerSettings(
            learning_rate, weight_decay, adam_betas, adam_eps, lr_scheduler, warmup_steps, optimizer
        )
        self.learning_rate = self.rate_in_use = learning_rate
        require_frozen_dtype(frozen_dtype)
        self.frozen_dtype = frozen_dtype
        self.activation_checkpointing = activation_checkpointing
        # Networks that never learn live outside of the module tree: no strategy, optimiser or checkpoint meets them.
        self.frozen: dict[str, nn.Module] = {}

    def networks(self) -> Iterator[nn.Module]:
        """Every network, trained and frozen: the models held in memory."""
        yield from self.children()
        yield from self.frozen.values()

    def read_along(self) -> list[Policy]:
        """Those that read each micro-batch of training without learning from it."""
        return []

    def setup(self, stage: str) -> None:
        """Every policy keeps to the tokens that the tokenizer has now: some may have been added since it was loaded.

        Raises:
            UserError: the constructor of a subclass has left something out; options that do not go together.
        """
        unset = [name for name in ("tokenizer", self.exported) if not hasattr(self, name)]
        if unset:
            raise UserError(
                f"{type(self).__name__} must set {' and '.join(f'self.{name}' for name in unset)} in its constructor, "
                "as AlignmentModule says"
            )
        for network in self.networks():
            if isinstance(network, Policy):
                keep_to_tokens(network, self.tokenizer, "model.tokenizer")
        # A precision that holds weights in 16 bits would round what batches bring along: denominators, log-probs of the
        # rollout and of the reference, advantages. Networks are given ids.
        self.trainer.precision_plugin.convert_input = as_it_is  # type: ignore[assignment, method-assign]
        quantized = {"frozen_dtype: nf4": self.frozen_dtype, "optimizer: adamw_8bit": self.optimizer_settings.optimizer}
        check_strategy(self.trainer)
        if holds_pieces(self.trainer):
            for option, value in quantized.items():
                if option.endswith(f": {value}"):
                    raise UserError(f"{option} cannot be held in pieces, as trainer.strategy would have it: use ddp")
        if cuts_networks(self.trainer) and any(isinstance(v, OwnModel) and v.parked for v in self.views().values()):
            raise UserError(
                "hold_reference: parked moves a whole network, and trainer.strategy holds it in pieces; set "
                "hold_reference: copy, or use ddp"
            )
        if self.frozen_dtype is not None:
            require_precision(self.frozen_dtype, str(self.trainer.precision))
            if all(p.requires_grad for network in self.networks() for p in network.parameters()):
                raise UserError(
                    f"frozen_dtype ({self.frozen_dtype}) is of weights that never learn, and here all do: set lora, or "
                    "drop it; trainer.precision says what weights that learn are held in"
                )
        for network in self.children() if stage == "fit" and self.activation_checkpointing else ():
            if isinstance(network, Network):
                network.checkpoint_activations()
        if stage == "fit":
            self.find_load_balance()

    def on_train_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Refuse batches that are none of this library's, nor of a user's own kind."""
        require_batch(self, batch)

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = on_train_batch_start

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Evaluate held-out data."""
        self.evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """As validation, on the test data."""
        self.evaluate(batch, "test")

    def evaluate(self, batch: Any, stage: str) -> None:
        """Log what the algorithm is judged by, as `stage`/what."""
        raise NotImplementedError(f"{type(self).__name__} says how it is evaluated")  # pragma: no cover

    @torch.no_grad()
    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Complete each prompt; the columns of its row stand beside it."""
        return self.best_of.rows(self.policy, self.tokenizer, batch, self.generation)

    def exportable(self) -> PreTrainedModel:
        """The Hugging Face model that this stage is about: its weights become the artefact."""
        model: PreTrainedModel = getattr(self, self.exported).model
        return model

    def exported_weights(self) -> dict[str, Tensor]:
        """Its weights on the CPU, as of `full_state_dict`; where an adapter learns, what has learnt alone."""
        network = getattr(self, self.exported)
        if network.adapters is None:
            return full_state_dict(network.model)
        return {name.removeprefix("model."): w for name, w in full_state_dict(network).items() if name[:6] == "model."}

    def before_export(self) -> None:
        """Learn what the artefact needs besides training; called on all ranks where weights in memory are exported."""

    def artefact(
        self,
        dtype: torch.dtype | None = None,
        facts: Mapping[str, Any] | None = None,
        merge: bool | None = None,
    ) -> Artefact:
        """What stands beside the exported weights.

        Args:
            dtype: of the weights on disk; None = that of the folder they came from.
            facts: of the checkpoint that they are taken from; None = weights as they are.
            merge: fold an adapter into its base; None = only where it could not be loaded elsewhere.
        """
        network = getattr(self, self.exported)
        stops = stop_token_ids(self.tokenizer, network.model.generation_config)
        return artefact(network.model, self.tokenizer, stops, dtype, self.score_head(facts), network.origin, merge)

    def score_head(self, facts: Mapping[str, Any] | None) -> ScoreHead | None:
        """What becomes of a scalar head in an export, by the facts of a checkpoint or, for None, of this module."""
        return None

    def samples(self, prompts: PromptBatch) -> list[Sample]:
        """Text that shows a person what the model does on these prompts, and numbers for each of its tokens.

        Completions end where the context does: a run is not stopped by what illustrates it.
        """
        room = room_for_response(self.policy, prompts.prompt_ids)
        limit = self.generation.max_new_tokens if room is None else min(self.generation.max_new_tokens, room)
        settings = replace(self.generation, max_new_tokens=limit)
        episodes = complete(self.policy, self.tokenizer, prompts, settings)
        rows = with_known_completions(episode_rows(self.tokenizer, episodes), prompts)
        return read_samples(rows, examples_of(episodes), self.tokenizer, self.token_readings, self.device)

    def token_readings(self, packed: PackedBatch) -> dict[str, Tensor]:
        """What this stage knows of each response token, by name: (M,) each."""
        return {"log-prob": self.policy(packed)[0]}

    def configure_model(self) -> None:
        """Shard every network under FSDP2 (`ModelParallelStrategy`); other strategies need nothing.

        Under `bf16-mixed` shards are float32, weights are gathered in bfloat16, and gradients summed in float32.

        Raises:
            UserError: the strategy has groups of ranks that would share tensors, and so do the same work.
        """
        mesh = self.device_mesh
        if mesh is not None:
            group, ranks = mesh["tensor_parallel"].size(), self.trainer.world_size
            check_tensor_parallel(group, ranks)
            compute = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
            tell_read_whole(dict(self.named_children()) | self.frozen)
            for network in self.networks():
                shard(network, mesh["data_parallel"], compute)
                if isinstance(network, Network):
                    network.settle()

    def on_train_start(self) -> None:
        """Go on where a checkpoint was taken; refuse what Lightning would not do as it was asked."""
        super().on_train_start()
        require_validation(self.trainer)
        warn_of_rounding(self.parameters(), self.learning_rate, str(self.trainer.precision))

    def on_validation_epoch_end(self) -> None:
        """Refuse callbacks that watch what nothing logs, at the first validation, which may be before training."""
        require_monitors(self.trainer, held_out=True)

    def on_train_epoch_end(self) -> None:
        """As in validation; Lightning's own callbacks look afterwards."""
        require_monitors(self.trainer, held_out=False)

    def on_predict_start(self) -> None:
        """Refuse to hand out what random weights make, or to measure them; `fit` validates them as it likes.

        Raises:
            UserError: neither the model's folder nor a checkpoint gave trained ones.
        """
        if self.untrained is not None and self.trainer.state.fn != TrainerFn.FITTING:
            raise UserError(self.untrained)

    def on_validation_start(self) -> None:
        """As `on_predict_start`; say so where the policy is compared with itself."""
        AlignmentModule.on_predict_start(self)
        compared = self.views().get("reference", NO_REFERENCE) != NO_REFERENCE
        if compared and not self.has_learnt and self.trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING):
            warn_of_itself(type(self).__name__, self.hparams)

    on_test_start = on_validation_start
