"""Reward model: learn a scalar score from pairwise preferences."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lit_rlhf.algorithms.calibration import Calibration, calibration
from lit_rlhf.algorithms.chosen import ChosenFunction, chosen_comparison, with_bound
from lit_rlhf.algorithms.preference import PreferenceModule, agreement
from lit_rlhf.algorithms.samples import Sample, known_examples, known_texts, read_samples
from lit_rlhf.data.batches import PreferenceBatch, PromptBatch
from lit_rlhf.data.batching import ResumableLoader
from lit_rlhf.engine.packing import PackedBatch
from lit_rlhf.engine.sharding import gathered
from lit_rlhf.errors import UserError, damaged, named_by, require, require_alike
from lit_rlhf.losses import (
    bradley_terry_loss,
    centring_loss,
    rao_kupper_loss,
    scaled_bradley_terry_loss,
    score_difference_loss,
)
from lit_rlhf.losses.advantages import Moments
from lit_rlhf.models.adapters import LoRA
from lit_rlhf.models.heads import OF_RESPONSES
from lit_rlhf.models.loading import load_scorer
from lit_rlhf.models.saving import ScoreHead
from lit_rlhf.models.tokens import load_tokenizer
from lit_rlhf.rollout.play import predicted_rows
from lit_rlhf.rollout.rewards import scores

READ_MARGINS = (scaled_bradley_terry_loss, score_difference_loss)  # which are nothing without them


class RewardModel(PreferenceModule):
    """Bradley-Terry reward model: minimise -log σ(r(x, y_w) - r(x, y_l)).

    Christiano et al. 2017, https://arxiv.org/abs/1706.03741; Ouyang et al. 2022, Eq. 1, https://arxiv.org/abs/2203.02155

    The score is read at the last token of prompt and response. Exported and loaded as
    `AutoModelForSequenceClassification` with one label. Preferences leave a constant of the score open: the export is
    shifted so that held-out responses score 0 in the mean. That head has no bias in transformers' models: the shift is
    `score_bias` in config.json, which our rewards and critics add and others may leave out.

    Args:
        policy: folder or hub name of the causal LM to start from, normally the SFT model; or of a reward model.
        normalize: what the export is shifted and scaled to over the responses that validation reads (training, where
            there is no validation): "mean" 0, "mean_and_std" 0 and 1, or null = scores as learnt.
        loss: what scores have to do with how a pair was judged: a function of (chosen_scores, rejected_scores, margin),
            (B,) each, that gives (B,) losses: one of `lit_rlhf.losses.comparisons`, or one of yours.
        center_coef: weight of `centring_loss`, which holds the scores of each pair around 0, where the export's shift
            is one number for all prompts; 0 = none, 0.01 is common.
        fresh_head: draw the scalar head anew from N(0, 1/√(d+1)), or keep a reward model's; null = keep it where there
            is one.
        lora: train an adapter on frozen weights; null = all weights, or the adapter in policy's folder.
        merge_start: fold the adapter in policy's folder into its base before anything else.
        trust_remote_code: run model code that comes with the weights.
        kwargs: the optimiser's settings, see `AlignmentModule`.
    """

    predicts_from = "scored"
    exported = "reward_model"

    def __init__(
        self,
        policy: str = "demo",
        normalize: Literal["mean", "mean_and_std"] | None = "mean",
        loss: ChosenFunction | Callable[..., Any] = bradley_terry_loss,
        center_coef: float = 0.0,
        fresh_head: bool | None = None,
        lora: LoRA | None = None,
        merge_start: bool = False,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        require(0 <= center_coef < math.inf, "center_coef", center_coef, "0 or more and finite")
        self.normalize = normalize
        chosen = with_bound(loss)
        with named_by("model.loss"):
            self.compare = chosen_comparison(chosen)
        self.reads_margins = True if chosen.function in READ_MARGINS else None
        self.reads_ties = chosen.function is rao_kupper_loss
        self.center_coef = center_coef
        self.reward_model = load_scorer(
            policy, fresh_head, trust_remote_code, lora, merge_start, frozen_dtype=self.frozen_dtype
        )
        self.tokenizer = load_tokenizer(policy, self.reward_model.model.config, trust_remote_code)
        if self.reward_model.fresh_head:
            self.untrained = OF_RESPONSES.is_random(asked=bool(fresh_head))
        self.bins: Tensor | None = None  # of the evaluation under way, see `calibration`
        self.seen_scores: list[Tensor] = []  # in the evaluation under way
        self.score_moments: Moments | None = None  # of held-out scores; None once the weights have moved

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """One micro-batch: the Bradley-Terry loss of its pairs."""
        chosen, rejected = self.reward_model(batch.packed, batch.packed.last_nodes).chunk(2)
        losses = self.pair_losses(chosen, rejected, batch)
        losses = losses + self.balance_term("reward_model", len(chosen))
        self.log_pairs("train", batch, losses, agreement(chosen, rejected))
        self.watch({"train/margin": chosen - rejected, "train/score": torch.cat([chosen, rejected])})
        return losses.sum() / batch.denominator

    def on_validation_epoch_end(self) -> None:
        """Log how far confidence is from accuracy, and keep what an export needs to know of the scores."""
        if self.seen_scores and not self.trainer.sanity_checking:
            self.score_moments = self.moments_over_ranks(torch.cat(self.seen_scores))
        self.report("val")
        super().on_validation_epoch_end()

    def on_test_epoch_end(self) -> None:
        """As in validation."""
        self.report("test")

    def evaluate(self, batch: PreferenceBatch, stage: str) -> None:
        """Log loss, accuracy, margin and confidence, as means over all pairs."""
        chosen, rejected = self.reward_model(batch.packed, batch.packed.last_nodes).chunk(2)
        losses = self.pair_losses(chosen, rejected, batch)
        confidence = (chosen - rejected).abs().sigmoid().mean()
        self.log_pairs(stage, batch, losses, {"confidence": confidence, **agreement(chosen, rejected)})
        self.watch({f"{stage}/margin": chosen - rejected, f"{stage}/score": torch.cat([chosen, rejected])})
        self.seen_scores += [chosen, rejected]
        bins = torch.stack(calibration(chosen - rejected))
        self.bins = bins if self.bins is None else self.bins + bins

    def pair_losses(self, chosen: Tensor, rejected: Tensor, batch: PreferenceBatch) -> Tensor:
        """(B,) losses of pairs by the scores of their responses."""
        losses = self.compare(chosen, rejected, batch.margin)
        return losses + self.center_coef * centring_loss(chosen, rejected) if self.center_coef else losses

    def report(self, stage: str) -> None:
        """Log the expected calibration error over the pairs of all ranks."""
        if self.bins is not None:
            error = Calibration(*self.sum_over_ranks(self.bins)).error
            self.log(f"{stage}/calibration_error", error, sync_dist=True)  # the same on all ranks
        self.bins, self.seen_scores = None, []

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """The scores that validation saw are soon those of other weights."""
        super().on_before_optimizer_step(optimizer)
        self.score_moments = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what an export of these weights needs to know about their scores."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["scores"] = self.score_facts()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take what was known about the scores."""
        super().on_load_checkpoint(checkpoint)
        name, held = damaged(self.resumed_file, "scores"), checkpoint.get("scores", {})
        require_alike(held, {}, name)
        moments = held.get("moments")
        require_alike(moments, None if moments is None else [0.0, 0.0, 0.0], f"{name}['moments']")
        self.score_moments = None if moments is None else Moments(*torch.tensor(moments, dtype=torch.float64))

    @torch.no_grad()
    def before_export(self) -> None:
        """Score the held-out responses, unless validation has scored them with these very weights."""
        if self.normalize is None or self.score_moments is not None:
            return
        self.trainer.fit_loop.epoch_loop.val_loop.setup_data()  # not yet, where a checkpoint left nothing to train
        batches: Any = self.trainer.val_dataloaders or self.trainer.train_dataloader
        if isinstance(batches, ResumableLoader):
            batches.rewind()
        scores = []
        with gathered(self.reward_model), self.trainer.precision_plugin.forward_context():
            for batch in batches:
                packed = move_data_to_device(batch, self.device).packed
                scores.append(self.reward_model(packed, packed.last_nodes))
        self.score_moments = self.moments_over_ranks(torch.cat(scores))

    def score_facts(self) -> dict[str, Any]:
        """How the scores are to be normalised, and what is known about them, as plain values."""
        moments = None if self.score_moments is None else [float(value) for value in self.score_moments]
        return {"normalize": self.normalize, "bias": self.reward_model.bias, "moments": moments}

    def score_head(self, facts: Mapping[str, Any] | None) -> ScoreHead:
        """What the normalisation of scores comes to."""
        return score_head(self.score_facts()) if facts is None else stored_score_head(facts)

    @torch.no_grad()
    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Score the `completion` that stands beside each prompt, read as in training.

        Raises:
            UserError: the rows have no completion.
        """
        if batch.response_ids is None:
            raise UserError(
                "a reward model scores completions, so its predict data need the columns prompt and completion; "
                f"found {sorted(batch.columns)}"
            )
        values = scores(self.reward_model, batch.prompt_ids, batch.response_ids)
        return predicted_rows(batch, [{"score": value} for value in values.tolist()])

    def samples(self, prompts: PromptBatch) -> list[Sample]:
        """Held-out completions with their scores, where the data has them, and the score after each of their tokens."""
        if prompts.response_ids is None:
            return []
        texts = known_texts(self.tokenizer, prompts)
        rows = [text | {"score": row["score"]} for text, row in zip(texts, self.predict_step(prompts, 0), strict=True)]
        return read_samples(rows, known_examples(prompts), self.tokenizer, self.token_readings, self.device)

    def token_readings(self, packed: PackedBatch) -> dict[str, Tensor]:
        """(M,) what the response would score if it ended with each of its tokens."""
        return {"score so far": self.reward_model(packed, packed.predictors + 1)}


def stored_score_head(facts: Mapping[str, Any]) -> ScoreHead:
    """That of the weights of a checkpoint, by its facts; says so where these do not know the scores."""
    scores = {"normalize": None, "bias": 0.0, "moments": None} | facts.get("scores", {})
    if scores["normalize"] is not None and scores["moments"] is None:
        rank_zero_warn(
            f"the scores are exported as learnt, not normalised ({scores['normalize']}): no validation has seen the "
            "weights of this checkpoint. Of a run's last, fit with the run's config and this ckpt_path normalises them"
        )
    return score_head(scores)


def score_head(facts: Mapping[str, Any]) -> ScoreHead:
    """What the normalisation of scores comes to: the gain into the head, the shift into the config.

    Args:
        facts: see `RewardModel.score_facts`; scores of unknown moments stay as learnt.

    Raises:
        UserError: they are to be scaled and are all equal.
    """
    normalize, bias, known = facts["normalize"], facts["bias"], facts["moments"]
    if normalize is None or known is None:
        return ScoreHead(1.0, bias)
    moments = Moments(*torch.tensor(known, dtype=torch.float64))
    std = moments.variance.sqrt().item() if normalize == "mean_and_std" else 1.0
    if not std > 0:
        raise UserError("normalize: mean_and_std cannot scale scores that are all equal; has the model learnt?")
    return ScoreHead(1 / std, (bias - moments.mean.item()) / std)
