"""The rewards of a run: several with weights, some that are only watched, and whose fault an error is."""

import contextlib
import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lit_rlhf import time_limit
from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.errors import UserError, named_by, one_line
from lit_rlhf.models.fingerprints import Fingerprints
from lit_rlhf.models.policy import Policy
from lit_rlhf.rollout import rewards
from lit_rlhf.rollout.rewards import Reward, TextReward, path_of
from lit_rlhf.signals import Stop
from token_mdp import Episode, RewardError
from token_mdp import rewards as calling
from token_mdp.answers import as_numbers, told
from token_mdp.rewards import call_batched

RewardLike = Reward | Callable[..., Any]
SINGLE = "reward"  # the name of a reward that was given none, where it needs one
# Rewards are computed with in float32, and squared: beyond this the squares of a rollout's would overflow.
LARGEST = 1e15
# Metrics of a rollout that are not rewards of the user's.
ON_THE_WAY = {module.__file__ for module in (calling, rewards, time_limit, contextlib)}  # from the call to the function
TAKEN = (
    "score",
    "shaped_score",
    "response_length",
    "eos_fraction",
    "repeated_fraction",
    "entropy",
    "kl",
    "kl_coef",
    "sampler_gap",
    "equal_groups",
    "dropped_groups",
    "best_score",
    "process",
    "shaping",
)


class Term(NamedTuple):
    """A reward, what it weighs in the sum, and the option that names it."""

    name: str
    reward: Reward
    weight: float
    option: str


class Rewards:
    """What responses earn: Σ weight · reward; and monitors, which are logged but weigh nothing.

    Args:
        reward: a reward or a function of text; or several, as a mapping from name to reward or (reward, weight), or as
            a list of these, named after their functions.
        weights: weight by name; those not named here weigh 1, or what stands beside them.
        monitors: further rewards by name.

    Raises:
        UserError: something that is no reward, names that are taken or given twice, or weights that mean nothing.
    """

    def __init__(
        self,
        reward: Any,
        weights: Mapping[str, float] | None = None,
        monitors: Mapping[str, RewardLike] | None = None,
    ) -> None:
        several = isinstance(reward, Mapping | list | tuple)
        learnt = named_rewards(reward) if several else {SINGLE: (as_reward(reward, "data.reward"), 1.0)}
        weights, monitors = {} if weights is None else weights, {} if monitors is None else monitors
        for option, given in (("reward_weights", weights), ("monitors", monitors)):
            if not isinstance(given, Mapping):
                raise UserError(
                    f"data.{option} ({one_line(repr(given))}) must be a mapping, from names to what they stand for"
                )
        if unknown := [name for name in weights if name not in learnt or not several]:
            there = f"rewards names {sorted(learnt)}" if several else "reward is one alone, whose weight is 1"
            raise UserError(f"data.reward_weights names {unknown}, and data.{there}")
        self.terms = [
            Term(
                name,
                one,
                as_weight(name, weights.get(name, weight)),
                f"data.rewards.{name}" if several else "data.reward",
            )
            for name, (one, weight) in learnt.items()
        ]
        if not any(term.weight for term in self.terms):
            raise UserError("all weights of data.rewards are 0: nothing would be learnt")
        for name, monitor in monitors.items():
            if name in learnt:
                raise UserError(f"data.monitors and data.rewards both have a reward named {name!r}; rename one of them")
            option = f"data.monitors.{name}"
            self.terms.append(Term(as_name(name, "data.monitors"), as_reward(monitor, option), 0.0, option))

    @classmethod
    def given(
        cls,
        one: RewardLike | None,
        several: Mapping[str, RewardLike] | None,
        weights: Mapping[str, float] | None,
        monitors: Mapping[str, RewardLike] | None,
    ) -> "Rewards":
        """Of the options `data.reward` and `data.rewards`, of which one must be given; the others as above.

        Raises:
            UserError: both are given, or none is.
        """
        if (one is None) == (several is None):
            both = "both given" if several is not None else "both missing"
            raise UserError(f"data.reward and data.rewards are {both}: give one reward, or several by name, and null")
        return cls(several if one is None else one, weights, monitors)

    @property
    def abstain(self) -> bool:
        """Whether any of them may have nothing to say of a response."""
        return any(term.reward.abstain for term in self.terms)

    @property
    def reward_fn(self) -> Any:
        """The rewards as the environment takes them: one by itself, or weighted components."""
        if len(self.terms) == 1 and not self.abstain and self.terms[0].name == SINGLE:
            return self.terms[0].reward
        return {term.name: (term.reward, term.weight) for term in self.terms}

    def networks(self) -> Iterator[nn.Module]:
        """Models that the rewards hold in memory."""
        for term in self.terms:
            yield from term.reward.networks()

    def views(self) -> dict[str, Any]:
        """Where each of them lives, by name."""
        return {role: view for term in self.terms for role, view in term.reward.views(term.name).items()}

    def stands_on(self) -> dict[str, Fingerprints]:
        """By option, the folders of weights that rewards score by."""
        return {term.option: dict(term.reward.stands_on) for term in self.terms if term.reward.stands_on}

    def share(self, policy: Policy) -> None:
        """Let reward models stand on the policy's frozen base, where that is their own."""
        for term in self.terms:
            with named_by(term.option):
                term.reward.share(policy)

    def bind(
        self, tokenizer: PreTrainedTokenizerBase, device: torch.device, prompts: Iterable[PromptBatch] = ()
    ) -> None:
        """Get all of them ready.

        Args:
            tokenizer: the policy's.
            device: the policy's.
            prompts: that responses to will be scored, for their columns.

        Raises:
            UserError: one cannot be called with these columns, or reads other tokens than the policy's.
        """
        columns = [list(batch.columns) for batch in prompts]
        for term in self.terms:
            with named_by(term.option):
                for names in columns:
                    term.reward.check_columns(names)
                term.reward.bind(tokenizer, device)

    def read(self, prompts: PromptBatch) -> PromptBatch:
        """These prompts without the columns that no reward reads."""
        wanted = set().union(*(term.reward.reads(prompts.columns) for term in self.terms))
        return prompts._replace(columns={name: rows for name, rows in prompts.columns.items() if name in wanted})

    @contextlib.contextmanager
    def naming(self, prompts: PromptBatch) -> Iterator[None]:
        """Say of an error whose it is: which reward's, where in its code, and at which of these prompts."""
        try:
            yield
        except RewardError as error:
            if isinstance(error.__cause__, Stop):  # a signal met the function, whose fault it is not
                raise error.__cause__ from None
            role = {f"reward_fn[{term.name!r}]": term for term in self.terms} | {"reward_fn": self.terms[0]}
            term = role.get(error.role)
            raise UserError(explain(error, term, prompts)) from error

    def settled(self, episodes: list[Episode], prompts: PromptBatch) -> list[Episode]:
        """Episodes whose rewards can be learnt from; a reward that abstained is 0 in them, and counted apart.

        Raises:
            UserError: a reward is too large to compute with, whether or not others make up for it.
        """
        for episode in episodes:
            values = episode.components or {self.terms[0].name: episode.reward}
            for term in self.terms:
                require_computable(term, values[term.name], prompts, episode.prompt_index)
        if any(term.reward.pays_steps for term in self.terms):
            episodes = self.with_steps(episodes, prompts)
        if not self.abstain:
            return episodes
        silent = [term.name for term in self.terms if term.reward.abstain]
        return [episode._replace(components=counted(episode.components, silent)) for episode in episodes]

    def with_steps(self, episodes: list[Episode], prompts: PromptBatch) -> list[Episode]:
        """Episodes that say which part of their rewards is paid with which of their tokens; the rest is of the last.

        Raises:
            UserError: a reward says something else than one finite number per token.
        """
        prompt_ids, responses = [e.prompt_ids for e in episodes], [e.response_ids for e in episodes]
        paid = [np.zeros(len(response)) for response in responses]
        for term in self.terms:
            if term.reward.pays_steps and term.weight:
                for episode, total, own in zip(
                    episodes, paid, term.reward.step_rewards(prompt_ids, responses), strict=True
                ):
                    total += term.weight * numbers_of_tokens(term, own, prompts, episode)
        return [episode._replace(step_rewards=rewards) for episode, rewards in zip(episodes, paid, strict=True)]


def require_computable(term: Term, value: float, prompts: PromptBatch, index: int) -> None:
    """Refuse a reward, as it is given or as it weighs, whose mean and variance over a rollout could overflow."""
    if math.isfinite(value) and abs(value) * max(abs(term.weight), 1.0) > LARGEST:
        weighs = f", which weighs {term.weight:g}," if term.weight not in (0.0, 1.0) else ""
        raise UserError(
            f"{term.option} ({term.reward}){weighs} gave {value:g} for {prompts.place(index)}: beyond ±{LARGEST:g}, "
            "rewards cannot be computed with in float32"
        )


def numbers_of_tokens(term: Term, given: Any, prompts: PromptBatch, episode: Episode) -> np.ndarray:
    """(T,) what a reward says that the tokens of a response are paid, refused where it is no finite number of each."""
    count = len(episode.response_ids)
    try:
        values, _ = as_numbers(given, count, abstain=False)
        wrong = "" if np.isfinite(values).all() else "values that are not finite"
    except ValueError as error:
        wrong = str(error)
    if wrong:
        raise UserError(
            f"{term.option} ({term.reward}): step_rewards must give one finite number per token, {count} of "
            f"{prompts.place(episode.prompt_index)}, got {wrong}"
        )
    return values


def counted(components: Mapping[str, float], silent: Sequence[str]) -> dict[str, float]:
    """Components without NaN, and for each that may abstain whether it did."""
    values = {name: 0.0 if math.isnan(value) else value for name, value in components.items()}
    return values | {f"{name}_abstained": float(math.isnan(components[name])) for name in silent}


def named_rewards(given: Any) -> dict[str, tuple[Reward, Any]]:
    """Several rewards by name, with their weights."""
    if isinstance(given, Mapping):
        entries = [(as_name(name, "data.rewards"), *with_weight(entry)) for name, entry in given.items()]
    else:
        pairs = [with_weight(entry) for entry in given]
        entries = [(as_name(own_name(one), "data.rewards"), one, weight) for one, weight in pairs]
    names = [name for name, _, _ in entries]
    if not entries or len(set(names)) < len(names):
        raise UserError(f"data.rewards needs one reward at least, each of a name of its own; got {names}")
    return {name: (as_reward(one, f"data.rewards.{name}"), weight) for name, one, weight in entries}


def own_name(given: Any) -> str:
    """The name of a function, or of the class of anything else."""
    function = given.function if isinstance(given, TextReward) else given
    return path_of(function).rpartition(".")[2]


def with_weight(entry: Any) -> tuple[Any, Any]:
    """A reward and its weight, which is 1 where none stands beside it."""
    return (entry[0], entry[1]) if isinstance(entry, tuple | list) and len(entry) == 2 else (entry, 1.0)


def as_reward(given: Any, option: str) -> Reward:
    """A reward as it is, a function of text in a `TextReward`."""
    with named_by(option):
        return given if isinstance(given, Reward) else TextReward(given)


def as_name(name: Any, option: str) -> str:
    """A name that a metric can have, and has not yet."""
    if not isinstance(name, str) or not name or name in TAKEN:
        raise UserError(f"{option}: a reward cannot be named {name!r}; other metrics are {', '.join(TAKEN)}")
    return name


def as_weight(name: str, weight: Any) -> float:
    """A weight that means something."""
    if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
        raise UserError(f"data.reward_weights: the weight of {name!r} ({weight!r}) must be a finite number")
    return float(weight)


def explain(error: RewardError, term: Term | None, prompts: PromptBatch) -> str:
    """What a reward did wrong, in the user's own words."""
    cause, at = error.__cause__, places(error.prompt_indices, prompts)
    if term is None:
        return f"{error.role.replace('reward_fn', 'data.rewards')} {error.problem} ({at})"
    who = f"{term.option} ({term.reward})"
    if isinstance(cause, UserError):  # says itself what is wrong
        return f"{who}: {cause} ({at})"
    if cause is None or not error.problem.startswith("raised "):
        return f"{who} {error.problem} ({at})"
    where = own_place(cause)
    hint = (
        "; it is called as function(prompts, responses, **columns)"
        if isinstance(cause, TypeError) and not where
        else ""
    )
    return f"{who} raised {told(cause)}{where}{hint} ({at})"


def own_place(error: BaseException) -> str:
    """Where in the file of the user's function an error came from; nothing if the call itself failed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in ON_THE_WAY]
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f", in {own[-1].filename}:{own[-1].lineno}" if own else ""


def places(indices: Sequence[int], prompts: PromptBatch) -> str:
    """Some prompts by their places in the data, the first of very many."""
    different = list(dict.fromkeys(indices))
    more = f"; and {len(different) - 5} more" if len(different) > 5 else ""
    return "; ".join(prompts.place(index) for index in different[:5]) + more


def scored(judge: Reward, option: str, prompts: PromptBatch, responses: Sequence[np.ndarray]) -> np.ndarray:
    """(n,) float64 of one response to each prompt, outside of an environment; errors as of `Rewards`."""
    judges = Rewards(judge)
    judges.terms = [judges.terms[0]._replace(option=option)]
    columns = {name: list(values) for name, values in prompts.columns.items()}
    with judges.naming(prompts):
        values = call_batched("reward_fn", judge, range(len(responses)), (prompts.prompt_ids, list(responses)), columns)
    for number, value in enumerate(values.tolist()):
        require_computable(judges.terms[0], value, prompts, number)
    return values
