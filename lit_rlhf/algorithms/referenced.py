"""Algorithms that compare the policy with a reference: where it lives, and when it moves."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lit_rlhf.algorithms.module import NO_REFERENCE
from lit_rlhf.algorithms.preference import PreferenceModule, response_logprobs
from lit_rlhf.algorithms.reference_cache import ReferenceCache
from lit_rlhf.algorithms.reference_update import ReferenceUpdate
from lit_rlhf.algorithms.settings import ReferenceSettings
from lit_rlhf.algorithms.teacher import Beside, named_reference
from lit_rlhf.engine.packing import PackedBatch
from lit_rlhf.errors import UserError, damaged, require_alike
from lit_rlhf.models.adapters import LoRA, refuse_dropout
from lit_rlhf.models.fingerprints import Fingerprints
from lit_rlhf.models.loading import load_policy_with_tokenizer
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.roles import HoldReference, Reference, SameBase, reference_of
from lit_rlhf.rollout.play import GenerationSettings


class ReferencedModule(PreferenceModule):
    """Base of DPO and KTO: a policy and π_ref, which stays what the policy was, unless it is to follow.

    Args:
        policy: folder or hub name of the causal LM to start from, normally the SFT model.
        reference: folder or hub name of π_ref; None = the policy as it is before the first step.
        cache_reference: compute the reference log-probs of all rows before the first step, instead of holding a
            second model in memory and running it each step; later runs find them on disk.
        reference_free: no reference, as if it were uniform: the implicit reward is β log π.
        reference_update: TR-DPO: let the reference follow the policy, by `alpha` and `every`; null = it stays.
        lora: train an adapter on frozen weights; null = all weights, or the adapter in policy's folder.
        merge_start: fold the adapter in policy's folder into its base before anything else.
        hold_reference: where the reference lives: "base" = on the policy's frozen base, the adapters that learn being
            off; "copy" = a model of its own; "parked" = likewise, on the CPU between uses; null = base if there is one.
        trust_remote_code: run model code that comes with the weights.
        generation: how `predict` and the sample tables write completions.
        kwargs: the optimiser's settings, see `AlignmentModule`.
    """

    beta: float  # of the implicit reward, β log π/π_ref
    read_as = ""  # how `logprobs_of` is not the plain sum, for caches of what it gives

    def __init__(
        self,
        policy: str = "demo",
        reference: str | None = None,
        cache_reference: bool = False,
        reference_free: bool = False,
        reference_update: ReferenceUpdate | None = None,
        lora: LoRA | None = None,
        merge_start: bool = False,
        hold_reference: HoldReference | None = None,
        trust_remote_code: bool = False,
        generation: GenerationSettings = GenerationSettings(),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        ReferenceSettings(reference, cache_reference, reference_free, reference_update is not None, hold_reference)
        refuse_dropout(lora, type(self).__name__)
        self.policy, self.tokenizer = load_policy_with_tokenizer(
            policy, False, trust_remote_code, lora, merge_start, self.frozen_dtype
        )
        if reference_update is not None:
            reference_update.require_whole(self.policy, self.frozen_dtype)
        self.still_reference: Reference | None = None  # a reference that stays, unless its log-probs are cached
        held = (hold_reference, self.frozen_dtype)
        if reference is not None:
            beside = Beside(self.policy, self.tokenizer, self.frozen, *held, trust_remote_code)
            self.still_reference = named_reference(reference, beside)
        elif self.policy.adapters or not (cache_reference or reference_free):
            self.still_reference = reference_of(self.policy, self.frozen, *held)
        if reference_update is not None:
            self.reference = reference_update.moving(self.frozen)
        self.reference_free = reference_free
        self.reference_update = reference_update
        self.cache_reference = cache_reference
        self.reference_cache = ReferenceCache()
        self.generation = generation

    @property
    def present_reference(self) -> Reference | Policy | None:
        """The reference that moves or the one that stays; None where its log-probs are all that there is."""
        return self.still_reference if self.reference_update is None else self.reference

    def views(self) -> dict[str, Any]:
        """Policy and reference."""
        cached = NO_REFERENCE if self.reference_free else "log-probs, cached"
        held = cached if self.cache_reference or self.reference_free else self.present_reference
        return {**super().views(), "reference": held}

    def read_along(self) -> list[Policy]:
        """The reference, which is as large as the policy, wherever it lives."""
        return [] if self.cache_reference or self.reference_free else [self.policy]

    def stands_on(self) -> dict[str, Fingerprints]:
        """As of all roles; of a reference whose log-probs are cached too, where a resumed run could compute them."""
        held = {} if self.still_reference is None else {"reference": self.still_reference.stands_on}
        return {**super().stands_on(), **held}

    @torch.no_grad()
    def reference_logprobs(
        self, packed: PackedBatch, row_ids: Tensor, split: str, columns: Sequence[int] = (0, 1)
    ) -> Tensor:
        """Log π_ref of responses: from the cache, the frozen or the moving reference; or zeros.

        Args:
            packed: the responses, column by column: the first of each row, then the second.
            row_ids: (B,) the rows that they belong to.
            split: train, val or test.
            columns: of `row_logprobs`, that these are.

        Returns:
            (B times columns,) in the order of the sequences.
        """
        if self.reference_free:
            return torch.zeros(packed.num_sequences, device=self.device)
        if self.cache_reference:
            return self.reference_cache[split][row_ids][:, columns].T.flatten()
        reference = self.present_reference
        assert reference is not None
        return self.logprobs_of(reference, packed)

    def logprobs_of(self, network: Policy | Reference, packed: PackedBatch) -> Tensor:
        """(B,) log-probs of responses as the loss reads them: those of their tokens, summed."""
        return response_logprobs(network, packed)

    def token_readings(self, packed: PackedBatch) -> dict[str, Tensor]:
        """Also log π/π_ref of each response token, whose mean over samples of π is the KL, and the implicit reward.

        Where π_ref is a cache of log-probs, no one knows those of other responses.
        """
        logprobs, reference = self.policy(packed)[0], self.present_reference
        if self.reference_free or reference is None:
            return {"log-prob": logprobs}
        logratio = logprobs - reference(packed)[0]
        return {"implicit reward": self.beta * logratio, "KL": logratio, "log-prob": logprobs}

    def row_logprobs(self, reference: Reference, batch: Any) -> Tensor:
        """(B, 2) log π_ref of what the loss reads of each row of a batch: the columns that a cache keeps."""
        raise NotImplementedError(f"{type(self).__name__} says what it compares")  # pragma: no cover

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's step; then, where it is to, the reference follows the policy."""
        super().optimizer_step(*args, **kwargs)
        if self.reference_update is not None:
            step = self.trainer.global_step + 1  # this one counts afterwards
            self.reference_update.follow(step, self.reference, self.policy)

    def on_fit_start(self) -> None:
        """Fill the cache of reference log-probs, unless a checkpoint brought it along."""
        self.fill_cache("train", "val")

    def on_validation_start(self) -> None:
        """Validation alone: the policy as loaded is the reference."""
        super().on_validation_start()
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self.fill_cache("val")

    def on_test_start(self) -> None:
        """As `on_validation_start`."""
        super().on_test_start()
        self.fill_cache("test")

    def fill_cache(self, *splits: str) -> None:
        """Reference log-probs of every row of these splits."""
        if self.cache_reference:
            # With a frozen base it is there for good; else it is what the policy was.
            here = SameBase(self.policy, ()) if self.still_reference is None else self.still_reference
            assert isinstance(here, SameBase)
            self.reference_cache.fill(
                self.trainer,
                here,
                splits,
                lambda batch: self.row_logprobs(here, batch),
                is_reference=self.still_reference is not None or not self.has_learnt,
                read_as=self.read_as,
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the cache: after a resume, the policy is no longer the reference."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["reference_cache"] = self.reference_cache.by_rows

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the cache of the run that goes on."""
        super().on_load_checkpoint(checkpoint)
        require_alike(checkpoint.get("reference_cache"), {}, damaged(self.resumed_file, "reference_cache"))
        fits = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if fits and checkpoint["reference_cache"] and not self.cache_reference and self.policy.adapters is None:
            raise UserError(
                "cache_reference is false, and the run of the checkpoint had its reference as cached log-probs, of "
                "weights that no one has kept: resume with cache_reference: true"
            )
        self.reference_cache = ReferenceCache(checkpoint["reference_cache"])
