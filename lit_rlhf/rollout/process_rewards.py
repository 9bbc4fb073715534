"""A process reward model as the reward: of whole responses, or paid where its steps end."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.chat import stop_token_ids
from lit_rlhf.data.examples import response_nodes
from lit_rlhf.data.steps import encode_steps
from lit_rlhf.engine.packing import Example, pack
from lit_rlhf.errors import UserError, require, require_types
from lit_rlhf.models.heads import OF_STEPS, ScalarHeadKind
from lit_rlhf.models.holding import FrozenDtype
from lit_rlhf.models.policy import Scorer
from lit_rlhf.models.roles import OnTrunk
from lit_rlhf.rollout.rewards import RewardModelReward

Aggregate = Literal["min", "mean", "last", "product", "sum"]
SO_FAR: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # (K,) of steps to (K,) of all up to each of them
    "min": np.minimum.accumulate,
    "mean": lambda values: np.cumsum(values) / np.arange(1, len(values) + 1),
    "last": lambda values: values,
    "product": np.cumprod,
    "sum": np.cumsum,
}


class ProcessRewardModelReward(RewardModelReward):
    """How probably the steps of a response are right, by a process reward model, in one pass over the response.

    A = min, mean, last, product or sum of the probabilities p_k of its steps; 0 of a response without a step. Lightman
    et al. 2023, https://arxiv.org/abs/2305.20050, rank whole solutions by the product; Wang et al. 2023
    (Math-Shepherd), https://arxiv.org/abs/2312.08935, by the minimum. With `pay: steps` the end of step k is paid
    A(p_1 … p_k) - A(p_1 … p_k-1): as much in all as `pay: end`, from which it differs by potential-based shaping (Ng et
    al. 1999) with A of the steps so far as the potential. Without a discount the best policy is the same, and credit
    comes earlier. `sum` pays each p_k as it is, and longer solutions more.

    A step of a response ends with the token that ends `step_separator`, the last one with the response.

    Args:
        model: folder or hub name of a process reward model, or of its adapter, as `ProcessRewardModel` exports.
        aggregate: what the probabilities of the steps come to.
        pay: "end" = with the last token; "steps" = as it changes, at the ends of steps; "shaping" = likewise, and with
            the last token all that was paid is taken back: it moves credit for other rewards, and is none itself.
        step_separator: text behind each step; null = what the model has learnt with, a line break where its folder does
            not say.
        max_tokens: as in `RewardModelReward`.
        frozen_dtype: as in `RewardModelReward`.
        trust_remote_code: run model code that comes with the weights.
    """

    kind: ClassVar[ScalarHeadKind] = OF_STEPS

    def __init__(
        self,
        model: str,
        aggregate: Aggregate = "min",
        pay: Literal["end", "steps", "shaping"] = "end",
        step_separator: str | None = None,
        max_tokens: int = 16_384,
        frozen_dtype: FrozenDtype | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        require_types(ProcessRewardModelReward.__init__, locals())
        require(step_separator != "", "step_separator", "empty text", "a text: by it the steps of a response are known")
        super().__init__(model, max_tokens, frozen_dtype, trust_remote_code)
        known = self.scorer.step_separator if self.saved is None else self.saved.step_separator  # type: ignore[union-attr]
        if step_separator is not None and known not in (None, step_separator):
            raise UserError(
                f"step_separator ({step_separator!r}) is not what stood behind the steps that {model} has learnt from "
                f"({known!r}): leave it out"
            )
        self.step_separator = step_separator or known or "\n"
        self.aggregate, self.pay = aggregate, pay
        self.pays_steps = pay != "end"
        self.kept: tuple[list[bytes], list[np.ndarray]] | None = None  # what was scored last, and what it came to

    def bind(self, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        """As of a reward model; and find the tokens that may end a step."""
        super().bind(tokenizer, device)
        self.steps = StepFinder(tokenizer, self.step_separator)

    def __call__(self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], **columns: Any) -> np.ndarray:
        """(n,) what each response is paid in all."""
        return np.array([paid.sum() for paid in self.step_rewards(prompts, responses)])

    def step_rewards(self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> list[np.ndarray]:
        """(T,) what each token of each response is paid; scored once, though the sum is asked for before the parts."""
        key = [ids.tobytes() for pair in zip(prompts, responses, strict=True) for ids in pair]
        if self.kept is None or self.kept[0] != key:
            found = [self.steps.find(response) for response in responses]
            read = [ids for ids, _, _ in found]
            with self.at_hand():
                scored = step_scores(self.scorer, prompts, read, [ends for _, ends, _ in found], self.max_tokens)
            self.kept = (
                key,
                [
                    self.paid(scores, places, len(response))
                    for scores, (_, _, places), response in zip(scored, found, responses, strict=True)
                ],
            )
        return self.kept[1]

    def paid(self, scores: np.ndarray, places: np.ndarray, length: int) -> np.ndarray:
        """(T,) what the tokens of a response are paid, by the scores (K,) of its steps and their places in it."""
        rewards = np.zeros(length)
        if len(scores):
            so_far = SO_FAR[self.aggregate](1 / (1 + np.exp(-scores)))
            if self.pay == "end":
                rewards[-1] = so_far[-1]
            else:
                rewards[places] = np.diff(so_far, prepend=0.0)
                rewards[-1] -= so_far[-1] * (self.pay == "shaping")
        return rewards


class StepFinder:
    """Finds the steps in responses of a policy.

    Args:
        tokenizer: the policy's.
        separator: what stands behind each step.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, separator: str) -> None:
        self.tokenizer, self.separator = tokenizer, separator
        self.stops = stop_token_ids(tokenizer)
        (self.closing,) = encode_steps(tokenizer, [separator])
        last = separator[-1]
        self.may_end = {token for token in range(len(tokenizer)) if last in str(tokenizer.decode([token]))}

    def find(self, response: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What is to be read of a response, where its steps end there, and where in the response they are paid.

        Args:
            response: (T,) token ids, the end token included where there is one.

        Returns:
            (T',) ids without the end token, the separator behind a last step that lacks it; (K,) places in them; (K,)
            places in the response: of the last step, if the response ended it, that of the response's last token.
        """
        ids = response[:-1] if len(response) and int(response[-1]) in self.stops else response
        ends, start = [], 0
        for place in range(len(ids)):
            if int(ids[place]) in self.may_end:
                text = str(self.tokenizer.decode(ids[start : place + 1].tolist()))
                step, found, _ = text.rpartition(self.separator)
                if found and step.strip():
                    ends.append(place)
                    start = place + 1
        paid_at = list(ends)
        if str(self.tokenizer.decode(ids[start:].tolist(), skip_special_tokens=True)).strip():
            ids = np.concatenate([ids, self.closing])
            ends.append(len(ids) - 1)
            paid_at.append(len(response) - 1)
        ids = ids if len(ids) else response  # a response that says nothing has no step, and something to be read
        return ids, np.array(ends, dtype=np.int64), np.array(paid_at, dtype=np.int64)


@torch.no_grad()
def step_scores(
    scorer: Scorer | OnTrunk,
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    step_ends: Sequence[np.ndarray],
    max_tokens: int = 8192,
) -> list[np.ndarray]:
    """The log-odds that each step is right, (K,) float64 of each response: one pass over each of them.

    Args:
        scorer: a process reward model.
        prompts: n of (P,) token ids.
        responses: n of (T,).
        step_ends: n of (K,), the places of last tokens in a response.
        max_tokens: of a packed batch, about.
    """
    found: list[np.ndarray] = [np.zeros(0)] * len(prompts)
    lengths = np.array([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)])
    order = np.argsort(lengths, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(lengths[order].cumsum() // max_tokens)) + 1):
        packed = pack([Example(prompts[i], (responses[i],)) for i in rows])
        ends = [step_ends[i] for i in rows]
        nodes = response_nodes(packed, [responses[i] for i in rows], ends).to(scorer.model.device)
        scores = scorer(move_data_to_device(packed, scorer.model.device), nodes).double().cpu().numpy()
        for i, own in zip(rows, np.split(scores, np.cumsum([len(places) for places in ends])[:-1]), strict=True):
            found[i] = own
    return found
