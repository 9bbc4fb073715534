"""Process reward model: learn from labels of steps whether each step of a solution is right."""

from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lit_rlhf.algorithms.calibration import Calibration, calibration
from lit_rlhf.algorithms.module import AlignmentModule
from lit_rlhf.algorithms.samples import Sample, known_examples, known_texts, read_samples
from lit_rlhf.algorithms.step_metrics import StepCounts, step_counts
from lit_rlhf.data.batches import PromptBatch, StepwiseBatch
from lit_rlhf.data.modules import StepwiseDataModule
from lit_rlhf.engine.packing import PackedBatch
from lit_rlhf.errors import UserError
from lit_rlhf.losses import process_reward_loss
from lit_rlhf.models.adapters import LoRA
from lit_rlhf.models.heads import OF_STEPS
from lit_rlhf.models.loading import load_scorer
from lit_rlhf.models.saving import ScoreHead
from lit_rlhf.models.tokens import load_tokenizer
from lit_rlhf.rollout.play import predicted_rows
from lit_rlhf.rollout.process_rewards import step_scores


class ProcessRewardModel(AlignmentModule):
    """Process reward model: minimise -y log σ(s) - (1 - y) log σ(-s) over the steps of solutions.

    Uesato et al. 2022, https://arxiv.org/abs/2211.14275; Lightman et al. 2023, https://arxiv.org/abs/2305.20050; of
    labels between 0 and 1, Wang et al. 2023 (Math-Shepherd), Eq. 2, https://arxiv.org/abs/2312.08935. The score s of a
    step is read at its last token, so that one pass over a solution scores all of its steps, each by what stands before
    it.

    Exported and loaded as `AutoModelForTokenClassification` with one label: σ of a logit is how probably the step that
    ends there is right. `step_separator` in config.json is the text that the steps of the data had behind them.

    Args:
        policy: folder or hub name of the causal LM to start from; or of a process reward model.
        fresh_head: draw the scalar head anew from N(0, 1/√(d+1)), or keep a process reward model's; null = keep it
            where there is one.
        lora: train an adapter on frozen weights; null = all weights, or the adapter in policy's folder.
        merge_start: fold the adapter in policy's folder into its base before anything else.
        trust_remote_code: run model code that comes with the weights.
        kwargs: the optimiser's settings, see `AlignmentModule`.
    """

    learns_from = "stepwise"
    predicts_from = "scored_steps"
    exported = "process_reward_model"

    def __init__(
        self,
        policy: str = "demo",
        fresh_head: bool | None = None,
        lora: LoRA | None = None,
        merge_start: bool = False,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        options: dict[str, Any] = {"role": self.exported, "frozen_dtype": self.frozen_dtype, "kind": OF_STEPS}
        self.process_reward_model = load_scorer(policy, fresh_head, trust_remote_code, lora, merge_start, **options)
        self.tokenizer = load_tokenizer(policy, self.process_reward_model.model.config, trust_remote_code)
        self.step_separator = self.process_reward_model.step_separator
        if self.process_reward_model.fresh_head:
            self.step_separator = None
            self.untrained = OF_STEPS.is_random(asked=bool(fresh_head))
        self.bins: Tensor | None = None  # of the evaluation under way, see `calibration`
        self.counts: Tensor | None = None  # likewise, see `StepCounts`

    def setup(self, stage: str) -> None:
        """Know what the steps of the data end with; a model that has learnt from others is not asked about these.

        Raises:
            UserError: it has.
        """
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, StepwiseDataModule):
            given, known = data.tokenization.step_separator, self.step_separator
            if known not in (None, given) and self.trainer.state.fn != TrainerFn.FITTING:
                raise UserError(
                    f"data.step_separator ({given!r}) is not what stood behind the steps that this model has learnt "
                    f"from ({known!r}): set it to that"
                )
            self.step_separator = given

    def training_step(self, batch: StepwiseBatch, batch_idx: int) -> Tensor:
        """One micro-batch: the cross-entropy of its steps."""
        scores = self.process_reward_model(batch.packed, batch.step_nodes)
        losses = process_reward_loss(scores, batch.labels)
        losses = losses + self.balance_term(self.exported, len(scores))
        self.log_steps("train", batch, scores, losses)
        return losses.sum() / batch.denominator

    def log_steps(self, stage: str, batch: StepwiseBatch, scores: Tensor, losses: Tensor) -> None:
        """Log means over the K steps of a micro-batch."""
        agrees = (scores > 0) == (batch.labels > 0.5)
        means = {"loss": losses.detach().mean(), "accuracy": agrees.float().mean(), "right_steps": batch.labels.mean()}
        self.log_mean(stage, means, weight=len(scores))

    def evaluate(self, batch: StepwiseBatch, stage: str) -> None:
        """Log loss, accuracy and confidence, as means over all steps; and count."""
        scores = self.process_reward_model(batch.packed, batch.step_nodes)
        self.log_steps(stage, batch, scores, process_reward_loss(scores, batch.labels))
        self.log_mean(stage, {"confidence": scores.abs().sigmoid().mean()}, weight=len(scores))
        bins = torch.stack(calibration(torch.where(batch.labels > 0.5, scores, -scores)))
        counts = torch.stack(step_counts(scores, batch.labels, batch.solution_ids))
        self.bins = bins if self.bins is None else self.bins + bins
        self.counts = counts if self.counts is None else self.counts + counts

    def on_validation_epoch_end(self) -> None:
        """Log what is of all steps together."""
        self.report("val")
        super().on_validation_epoch_end()

    def on_test_epoch_end(self) -> None:
        """As in validation."""
        self.report("test")

    def report(self, stage: str) -> None:
        """Log F1 and the expected calibration error over the steps of all ranks."""
        if self.bins is not None and self.counts is not None:
            metrics = StepCounts(*self.sum_over_ranks(self.counts)).metrics()
            metrics["calibration_error"] = Calibration(*self.sum_over_ranks(self.bins)).error
            self.log_dict({f"{stage}/{name}": value for name, value in metrics.items()}, sync_dist=True)
        self.bins = self.counts = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what an export tells of the steps."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["step_separator"] = self.step_separator

    def score_head(self, facts: Any) -> ScoreHead:
        """The head as it has learnt, and what stood behind the steps that it has learnt from."""
        separator = self.step_separator if facts is None else facts.get("step_separator")
        return ScoreHead(1.0, self.process_reward_model.bias, separator)

    @torch.no_grad()
    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """How probably each step in `completions` is right; null for steps that `max_length` leaves out."""
        assert batch.response_ids is not None and batch.step_ends is not None, "rows were read as `predicts_from` says"
        scored = step_scores(self.process_reward_model, batch.prompt_ids, batch.response_ids, batch.step_ends)
        rows = []
        for steps, scores in zip(batch.columns["completions"], scored, strict=True):
            probabilities = torch.from_numpy(scores).sigmoid().tolist()
            rows.append({"step_scores": probabilities + [None] * (len(steps) - len(probabilities))})
        return predicted_rows(batch, rows)

    def samples(self, prompts: PromptBatch) -> list[Sample]:
        """Held-out solutions, with the scores of their steps."""
        rows = [
            text | {"step_scores": rounded(row)}
            for text, row in zip(known_texts(self.tokenizer, prompts), self.predict_step(prompts, 0), strict=True)
        ]
        return read_samples(rows, known_examples(prompts), self.tokenizer, self.token_readings, self.device)

    def token_readings(self, packed: PackedBatch) -> dict[str, Tensor]:
        """(M,) the score of a step that would end with each token: 0 is as probably right as wrong."""
        return {"score so far": self.process_reward_model(packed, packed.predictors + 1)}


def rounded(row: dict[str, Any]) -> str:
    """The scores of a predicted row, to be read."""
    return " ".join("–" if score is None else f"{score:.2f}" for score in row["step_scores"])
