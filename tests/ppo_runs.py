"""Runs of PPO, or another method on policy, on a tiny model, and what to watch of them."""

import itertools

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from lit_rlhf import PPO, FixedKL, RolloutDataModule, TextReward

PROMPTS = "\n".join(f'{{"prompt": "w{3 + i} w{5 + i % 7} w{4 + i % 3}"}}' for i in range(16))


def count_w9(prompts, responses, **columns):
    """The toy reward: the share of w9 in the response."""
    return [response.split().count("w9") / max(len(response.split()), 1) for response in responses]


def constant(prompts, responses, **columns):
    """A reward that teaches nothing: what is learnt comes from elsewhere."""
    return [0.0] * len(responses)


def make(folder, tmp_path, reward=count_w9, trainer=None, data=None, kind=PPO, **options):
    (tmp_path / "prompts.jsonl").write_text(PROMPTS + "\n")
    torch.manual_seed(0)  # of the critic's head
    module = kind(str(folder), **({"learning_rate": 1e-3, "lr_scheduler": "constant"} | options))
    sizes = {"rollout_size": 16, "num_slots": 4, "max_new_tokens": 8, "validation": None}
    datamodule = RolloutDataModule(
        TextReward(reward),
        train=str(tmp_path / "prompts.jsonl"),
        tokenizer=module.tokenizer,
        **(sizes | (data or {})),
    )
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    settings = quiet | {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": tmp_path} | (trainer or {})
    return module, datamodule, Trainer(**settings)


class Steps(Callback):
    """Keeps the trained weights after each optimiser step, the start included, and what the step was."""

    def __init__(self):
        self.policy, self.critic, self.stopped, self.episodes, self.norms, self.rates = [], [], [], [], [], []

    def keep(self, module):
        for weights, network in ((self.policy, module.policy), (self.critic, module.critic)):
            weights.append(torch.cat([p.detach().flatten() for p in network.parameters()]))

    def on_train_start(self, trainer, pl_module):
        self.keep(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.keep(pl_module)
        self.stopped.append(pl_module.stopped)
        self.episodes.append(batch.packed.num_sequences)
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(torch.nn.utils.get_total_norm(gradients).item())
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def moved(weights):
    """For each optimiser step, whether it changed the weights."""
    return [not torch.equal(a, b) for a, b in itertools.pairwise(weights)]


def fit(folder, tmp_path, trainer=None, **options):
    """Train and keep the steps."""
    steps = Steps()
    module, data, trainer = make(folder, tmp_path, trainer={"callbacks": [steps]} | (trainer or {}), **options)
    trainer.fit(module, data)
    return module, steps


class Recording:
    """A part of a method's class that keeps what is trained on."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            logprobs, _ = self.policy(batch.packed, self.sampling.temperature)
        self.seen.append((batch, logprobs))
        return super().training_step(batch, batch_idx)


class Recorder(Recording, PPO):
    """PPO that keeps what it is trained on."""


def record(folder, tmp_path, kind=PPO, **options):
    """A run of a method that keeps what it is trained on."""
    module, data, trainer = make(folder, tmp_path, kind=kind, **options)
    module.__class__ = type(kind.__name__, (Recording, kind), {})
    module.seen = []
    trainer.fit(module, data)
    return module


def solved(folder, tmp_path, kind, iterations=12, **options):
    """The share of the rewarded token after some iterations of a method without a critic."""
    module, data, trainer = make(
        folder,
        tmp_path,
        kind=kind,
        kl=FixedKL(0.0),
        learning_rate=1e-2,
        trainer={"max_epochs": iterations, "gradient_clip_val": 1.0},
        data={"rollout_size": 64, "num_slots": 32, "group_size": 4},
        **options,
    )
    trainer.fit(module, data)
    assert module.critic is None and set(module.views()) == {"policy", "reference"}
    assert not any("critic" in name for name in module.state_dict())
    return module.rollout_metrics["rollout/score"]


class Rollouts(Callback):
    """Keeps the metrics of each rollout."""

    def __init__(self):
        self.metrics = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.metrics.append(dict(pl_module.rollout_metrics))


class Logged(Callback):
    """Keeps a logged metric, one value per micro-batch."""

    def __init__(self, name):
        self.name, self.values = name, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.name in trainer.callback_metrics:
            self.values.append(trainer.callback_metrics[self.name].item())


def away_from_reference(module):
    """Move the reference, as if the policy had left it."""
    generator = torch.Generator().manual_seed(5)
    for parameter in module.frozen["reference"].parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
