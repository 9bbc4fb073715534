"""The environment side of on-policy training: prompts, reward, slots, lengths."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.data.batching import as_it_is
from lit_rlhf.data.checks import (
    check_tools,
    check_trainer_options,
    named_sources,
    require_held_out_rows,
    require_kind,
    require_rows,
    require_rows_for_ranks,
    require_whole_epochs,
)
from lit_rlhf.data.control_tokens import ControlTokens
from lit_rlhf.data.formats import Sources
from lit_rlhf.data.mapping import Format
from lit_rlhf.data.naming import STAGES, Role
from lit_rlhf.data.prompts import load_prompts
from lit_rlhf.data.reader import Options
from lit_rlhf.data.report import Report
from lit_rlhf.data.settings import TokenizationSettings
from lit_rlhf.errors import UserError, require_types
from lit_rlhf.models.fingerprints import require_same
from lit_rlhf.rollout.demo_monitor import leave_out_gold
from lit_rlhf.rollout.loader import RolloutLoader
from lit_rlhf.rollout.minibatches import Minibatches
from lit_rlhf.rollout.play import RolloutBackend, check_context
from lit_rlhf.rollout.rewards import Reward
from lit_rlhf.rollout.scoring import Rewards
from lit_rlhf.rollout.settings import RolloutSettings

OF_REWARDS = ("reward", "rewards", "reward_weights", "monitors")  # options that `Rewards` checks


class RolloutDataModule(LightningDataModule):
    """Prompts, a token environment to play them in, and the reward that ends an episode.

    Args:
        reward: scores a whole response, paid on its last token: a reward, or a function of text by its import path.
        train: prompts to learn from: a file, a folder, the name of a dataset, or "demo".
        validation: held-out prompts, or the share of the training prompts that is held out (0.05), played at each
            validation; null = none.
        test: prompts for `test`; null = the validation prompts.
        predict: prompts for `predict`; null = the validation prompts, unless the demo's.
        format: as in `SFTDataModule`.
        columns: as in `SFTDataModule`.
        rewards: several in place of one, by name; their weighted sum is learnt from, each is logged as rollout/<name>.
        reward_weights: weight of each of them by name; 1 for those not named.
        monitors: further rewards by name, logged as rollout/<name> but not learnt from.
        rollout_size: episodes per iteration, over all ranks.
        group_size: completions of each prompt, which are played, packed and learnt from together; for methods that
            compare them. `rollout_size` is a multiple of it.
        num_slots: episodes played at the same time on each rank; a quarter of its episodes or fewer keeps them busy.
        max_tokens: of a micro-batch in scoring and learning, prompts and responses: an optimiser step takes as many
            micro-batches as that needs, and `accumulate_grad_batches` at least; null = no limit.
        max_prompt_length: longer prompts lose tokens on the left; null = what the model's context leaves.
        max_new_tokens: length limit of a response.
        stop_strings: texts that end a response as soon as they stand in it, as stop tokens do; they stay in it.
        max_validation_prompts: play at most this many held-out prompts.
        num_proc: processes that tokenise, once; null = one.
        seed: of the order of prompts.
        backend: what plays the training episodes; null = the slot cache in this process.
        chat_template: as in `SFTDataModule`.
        chat_template_kwargs: as in `SFTDataModule`.
        control_tokens: as in `SFTDataModule`.
        tokenizer: the policy's; linked by the CLI.
    """

    def __init__(
        self,
        reward: Reward | Callable[..., Any] | None = None,
        train: Sources | None = "demo",
        validation: float | Sources | None = "demo",
        test: Sources | None = None,
        predict: Sources | None = None,
        format: Format | None = None,
        columns: dict[str, str] | None = None,
        rewards: dict[str, Reward | Callable[..., Any]] | None = None,
        reward_weights: dict[str, float] | None = None,
        monitors: dict[str, Reward | Callable[..., Any]] | None = None,
        rollout_size: int = 256,
        group_size: int = 1,
        num_slots: int = 64,
        max_tokens: int | None = 16_384,
        max_prompt_length: int | None = None,
        max_new_tokens: int = 64,
        stop_strings: tuple[str, ...] = (),
        max_validation_prompts: int = 256,
        num_proc: int | None = None,
        seed: int = 0,
        backend: RolloutBackend | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        control_tokens: ControlTokens = "keep",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        given = locals()
        require_types(RolloutDataModule.__init__, {name: given[name] for name in given if name not in OF_REWARDS})
        require_held_out_rows(train, validation)
        self.rewards = Rewards.given(reward, rewards, reward_weights, monitors)
        held_out = {"validation": validation, "test": test or validation, "predict": predict}
        self.sources = named_sources({"train": train, **held_out}, format, columns, "prompts")
        self.settings = RolloutSettings(
            rollout_size,
            num_slots,
            max_tokens,
            max_new_tokens,
            tuple(stop_strings),
            max_validation_prompts,
            seed,
            group_size,
        )
        self.tokenization = TokenizationSettings(
            max_prompt_length=max_prompt_length,
            num_proc=num_proc,
            chat_template=chat_template,
            chat_template_kwargs={} if chat_template_kwargs is None else chat_template_kwargs,
            control_tokens=control_tokens,
        )
        self.backend = RolloutBackend() if backend is None else backend
        self.tokenizer = tokenizer
        self.prompts: dict[str, PromptBatch] = {}
        self.reports: dict[str, list[Report]] = {}  # what became of the rows that they come from, by source
        self.read_by: Options | None = None  # what prompts follow from beside the rows
        self.accumulate_grad_batches: int | None = None  # as the Trainer had it before `max_tokens` asked for more

    def prepare_data(self) -> None:
        """Tokenise on one process per machine, and the others find the cache; without a Trainer `setup` does it all."""
        if self.trainer is not None and self.trainer.state.fn is not None:
            self.setup(self.trainer.state.fn.value)

    def setup(self, stage: str) -> None:
        """Tokenise the prompts that this stage needs; without a Trainer they are there to be looked at (`prompts`)."""
        if self.tokenizer is None:
            raise UserError("RolloutDataModule needs the policy's tokenizer: pass tokenizer=model.tokenizer")
        trainer = self.trainer
        if trainer is not None:
            check_tools(trainer, stage)
        require_kind(trainer, "prompts")
        require_rows(stage, self.sources)
        self.tokenization.settle(self.tokenizer, self)
        options = self.tokenization.of_prompts(self.tokenizer, self.settings.max_new_tokens)
        if self.read_by != options:  # a model's context, too, may be another by now
            self.prompts, self.read_by = {}, options
        splits: tuple[Role, ...] = STAGES[stage]
        for split in splits:
            source = self.sources[split] or (self.sources["validation"] if split == "predict" else None)
            if source is not None and split not in self.prompts:
                loaded = load_prompts(source, split, self.tokenizer, options, num_proc=self.tokenization.num_proc)
                self.prompts[split] = loaded.take(np.arange(len(loaded)))
                self.reports[split] = loaded.reports
        if trainer is None:
            return
        agent: Any = trainer.lightning_module
        needed = [split for split in splits if split in self.prompts]
        limits = {"validation": self.settings.max_validation_prompts}
        counts = {split: len(self.prompts[split].prompt_ids[: limits.get(split)]) for split in needed}
        require_rows_for_ranks(trainer, counts, trainer.world_size)
        for split in needed:
            check_context(agent.policy, self.prompts[split].prompt_ids, self.settings.max_new_tokens)
        scored = [split for split in needed if split != "predict"]  # whose completions are not
        leave_out_gold(self.rewards, {split: self.prompts[split] for split in scored})
        self.rewards.share(agent.policy)
        self.rewards.bind(self.tokenizer, trainer.strategy.root_device, [self.prompts[split] for split in scored])
        self.prompts |= {split: self.rewards.read(self.prompts[split]) for split in scored}

    def state_dict(self) -> dict[str, Any]:
        """What the rewards score by; prompts and rollout are the state of the loader."""
        return {"stands_on": self.rewards.stands_on()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on with a reward model that was trained anew in its folder; another folder is another reward."""
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING:
            return
        given, here = state_dict.get("stands_on", {}), self.rewards.stands_on()
        file = "the checkpoint" if self.trainer is None else str(self.trainer.ckpt_path)
        require_same(given, {}, file=file)
        same = {option: mine for option, mine in here.items() if set(given.get(option, ())) == mine.keys()}
        require_same(given, same, file=file)

    def train_dataloader(self) -> RolloutLoader:
        """One pass over it is one PPO iteration.

        Raises:
            UserError: no Trainer, an option of it that would change the batches behind the plan's back, or an unequal
                share.
        """
        if self.trainer is None:
            raise UserError(
                "RolloutDataModule.train_dataloader needs a Trainer, since its batches are what a policy plays: "
                "trainer.fit(model, datamodule=data); to look at prompts, data.prompts after data.setup('fit')"
            )
        agent: Any = self.trainer.lightning_module
        agent.check_groups(self.settings.group_size)
        check_trainer_options(self.trainer)
        require_whole_epochs(self.trainer)
        size, group, ranks = self.settings.rollout_size, self.settings.group_size, self.trainer.world_size
        if size % (group * ranks):
            groups = "" if group == 1 else f" in groups of {group}"
            fits = max(size - size % (group * ranks), group * ranks)
            raise UserError(f"rollout_size ({size}) must divide among {ranks} ranks{groups}; try {fits}")
        self.accumulate_grad_batches = self.trainer.accumulate_grad_batches
        cut = self.minibatches()
        if cut.micro_batches > cut.accumulate_grad_batches and self.trainer.strategy.handles_gradient_accumulation:
            raise UserError(
                f"data.max_tokens ({cut.max_tokens}) cuts an optimiser step of {cut.episodes_of_part} episodes into up "
                f"to {cut.micro_batches} micro-batches, which {type(self.trainer.strategy).__name__} cannot sum: set "
                f"max_tokens to {replace(cut, max_tokens=None).most_tokens}, or raise num_minibatches"
            )
        self.trainer.accumulate_grad_batches = cut.micro_batches
        return RolloutLoader(self)

    def teardown(self, stage: str) -> None:
        """Leave the Trainer as it was given."""
        if self.trainer is not None and self.accumulate_grad_batches is not None:
            self.trainer.accumulate_grad_batches = self.accumulate_grad_batches
            self.accumulate_grad_batches = None

    def minibatches(self) -> Minibatches:
        """How the episodes of each iteration are cut, on this rank."""
        assert self.trainer is not None
        agent: Any = self.trainer.lightning_module
        groups = self.settings.rollout_size // self.trainer.world_size // self.settings.group_size
        kept = self.settings.group_size if agent.kept_of_group is None else agent.kept_of_group
        return Minibatches(
            groups * kept,
            agent.updates.ppo_epochs,
            agent.updates.num_minibatches,
            self.accumulate_grad_batches or self.trainer.accumulate_grad_batches,
            self.settings.max_tokens,
            max(map(len, self.prompts["train"].prompt_ids)) + self.settings.max_new_tokens,
            kept,
            self.settings.max_new_tokens,
            agent.compares_kept,
        )

    def val_dataloader(self) -> DataLoader | list:
        """This rank's share of the held-out prompts."""
        return self.prompt_loader("validation", self.settings.max_validation_prompts)

    def test_dataloader(self) -> DataLoader | list:
        """This rank's share of the test prompts, all of them."""
        return self.prompt_loader("test")

    def predict_dataloader(self) -> DataLoader | list:
        """This rank's share of the prompts to complete."""
        return self.prompt_loader("predict")

    def prompt_loader(self, split: str, limit: int | None = None) -> DataLoader | list:
        """This rank's batches, the k-th of rank r being batch k W + r of all; as many on each rank."""
        if split not in self.prompts:
            return []
        rank, ranks = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        prompts = self.prompts[split].take(slice(limit))
        count = len(prompts.prompt_ids)
        # Four times the slots, so that the longest episode of a batch does not idle the other slots for long.
        rounds = -(-count // (4 * self.settings.num_slots * ranks))
        bounds = np.linspace(0, count, rounds * ranks + 1).astype(int).tolist()
        batches = [prompts.take(slice(start, end)) for start, end in itertools.pairwise(bounds)]
        mine: Any = batches[rank::ranks]
        return DataLoader(mine, batch_size=None, collate_fn=as_it_is)

    def sample_prompts(self, count: int) -> PromptBatch | None:
        """The first held-out prompts, for sample tables."""
        held_out = self.prompts.get("validation")
        return None if held_out is None else held_out.take(slice(count))

    def training_share(self) -> PromptBatch:
        """This rank's training prompts."""
        assert self.trainer is not None
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        return self.prompts["train"].take(slice(rank, None, ranks))
