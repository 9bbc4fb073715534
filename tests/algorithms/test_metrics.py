from types import SimpleNamespace

import pytest
import torch

from lit_rlhf.algorithms.metrics import MetricsModule
from tests.algorithms.watched import watch


class Logged(MetricsModule):
    """Keeps what it logs; another rank has seen as much as this one."""

    def __init__(self):
        super().__init__()
        self.told = {}
        self._trainer = SimpleNamespace(strategy=SimpleNamespace(reduce=lambda sums, reduce_op: 2 * sums), world_size=2)

    trainer = property(lambda self: self._trainer)

    def log(self, name, value, **options):
        self.told[name] = float(value), options["prog_bar"]


def test_a_step_is_logged_as_the_mean_over_the_items_of_its_micro_batches():
    module = Logged()
    module.log_mean("train", {"loss": torch.tensor(1.0), "ppo/ratio": torch.tensor(3.0)}, weight=1)
    module.log_mean("train", {"loss": torch.tensor(5.0)}, weight=3)
    assert module.told == {}
    module.log_step()
    assert module.told == {"train/loss": (4.0, True), "ppo/ratio": (3.0, False)}
    module.told.clear()
    module.log_step()  # the next step has seen nothing yet
    assert module.told == {}


def test_means_and_moments_are_those_of_all_ranks():
    module = Logged()
    assert module.mean_over_ranks({"score": torch.tensor(1.5)}) == {"score": 1.5}
    total, squares, size = module.moments_over_ranks(torch.tensor([1.0, 2.0]))
    assert (total, squares, size) == (6.0, 10.0, 4.0)


@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo"])
def test_gradients_and_logged_loss_do_not_depend_on_the_split_into_micro_batches(inputs, tmp_path, stage):
    torch.manual_seed(0)  # the reward model's head is drawn at random
    whole = watch(stage, inputs, tmp_path, {"max_tokens": None, "batch_size": 24})
    torch.manual_seed(0)
    split = watch(stage, inputs, tmp_path, {"max_tokens": None, "batch_size": 5}, {"accumulate_grad_batches": 5})
    assert whole.micro_batches == 1 and split.micro_batches == 5
    assert split.losses == pytest.approx(whole.losses)
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(split.gradients[name], gradient, rtol=1e-4, atol=1e-6)
