"""Reward model: learn a scalar score from pairwise preferences."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.batches import PreferenceBatch, PromptBatch
from lit_rlhf.errors import UserError
from lit_rlhf.losses import bradley_terry_loss
from lit_rlhf.module import AlignmentModule, as_text
from lit_rlhf.packing import Example, pack
from lit_rlhf.policy import load_scorer, load_tokenizer, pad_token_id_for


class RewardModel(AlignmentModule):
    """Bradley-Terry reward model: minimise -log σ(r(x, y_w) - r(x, y_l)).

    Christiano et al. 2017, https://arxiv.org/abs/1706.03741; Ouyang et al. 2022, Eq. 1, https://arxiv.org/abs/2203.02155

    The score is read at the last token of prompt and response. Exported and loaded as
    `AutoModelForSequenceClassification` with one label.

    Args:
        policy: folder or hub name of the causal LM to start from, normally the SFT model; or of a reward model.
        fresh_head: draw the scalar head anew from N(0, 1/√(d+1)); False goes on training a stored reward model.
        trust_remote_code: run model code that comes with the weights.
        kwargs: the optimiser's settings, see `AlignmentModule`.
    """

    def __init__(
        self, policy: str = "demo", fresh_head: bool = True, trust_remote_code: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.reward_model = load_scorer(policy, fresh_head=fresh_head, trust_remote_code=trust_remote_code)
        self.tokenizer = load_tokenizer(policy, self.reward_model.model.config, trust_remote_code)
        self.reward_model.model.config.pad_token_id = pad_token_id_for(self.tokenizer)

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """One micro-batch: the Bradley-Terry loss of its pairs."""
        chosen, rejected = self.reward_model(batch.packed, batch.packed.last_nodes).chunk(2)
        losses = bradley_terry_loss(chosen, rejected, batch.margin)
        self.log_mean("train", {"loss": losses.detach().mean(), **agreement(chosen, rejected)}, weight=len(losses))
        return losses.sum() / batch.denominator

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Accuracy on held-out pairs."""
        self.evaluate(batch, "val")

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """As validation, on the test data."""
        self.evaluate(batch, "test")

    def evaluate(self, batch: PreferenceBatch, stage: str) -> None:
        """Log loss, accuracy and margin, as means over all pairs."""
        chosen, rejected = self.reward_model(batch.packed, batch.packed.last_nodes).chunk(2)
        loss = bradley_terry_loss(chosen, rejected, batch.margin).mean()
        self.log_mean(stage, {"loss": loss, **agreement(chosen, rejected)}, weight=len(chosen))

    @torch.no_grad()
    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Score the `completion` that stands beside each prompt.

        Raises:
            UserError: the rows have no completion.
        """
        completions = batch.columns.get("completion")
        if completions is None:
            raise UserError(
                "a reward model scores completions, so its predict data need the columns prompt and completion; "
                f"found {sorted(batch.columns)}"
            )
        rows = []
        for prompt_ids, completion in zip(batch.prompt_ids, completions, strict=True):
            text = completion if isinstance(completion, str) else completion[-1]["content"]
            response = [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]
            packed = self.transfer_batch_to_device(pack([Example(prompt_ids, (np.array(response),))]), self.device, 0)
            score = self.reward_model(packed, packed.last_nodes).item()
            rows.append({"prompt": as_text(self.tokenizer, prompt_ids), "completion": text, "score": score})
        return rows

    def sample_table(self, prompts: PromptBatch) -> list[dict[str, Any]]:
        """Scores of held-out completions, where the data has them."""
        return self.predict_step(prompts, 0) if "completion" in prompts.columns else []

    def exportable(self) -> PreTrainedModel:
        """The sequence classifier with its scalar head."""
        return self.reward_model.model


def agreement(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """How well the scores of B pairs agree with the labels; a tie is half right."""
    margin = (chosen - rejected).detach()
    accuracy = (margin > 0).float() + 0.5 * (margin == 0).float()
    return {"accuracy": accuracy.mean(), "margin": margin.mean()}
