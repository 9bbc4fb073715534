import pytest
import torch

from lit_rlhf import SFT, RewardModel
from lit_rlhf.callbacks.export import export
from lit_rlhf.engine.sharding import full_state_dict


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """A folder in which the models that later configs start from have been exported."""
    folder = tmp_path_factory.mktemp("configs")
    torch.manual_seed(0)
    for module, name in (
        (SFT("demo", from_scratch=True), "sft"),
        (None, "reward_model"),
        (SFT("demo", from_scratch=True), "ppo"),  # a teacher
    ):
        module = module or RewardModel(str(folder / "runs/sft/model"))
        export(module, full_state_dict(module.exportable()), folder / "runs" / name / "model")
    return folder
