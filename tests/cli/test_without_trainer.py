import pytest

from lit_rlhf.cli.without_trainer import WithoutTrainer
from lit_rlhf.demo import CONFIGS


@pytest.mark.filterwarnings("ignore")
def test_module_and_data_of_a_runs_own_config_are_made_and_no_trainer():
    argv = ["--config", str(CONFIGS / "sft.yaml"), "--ckpt_path=gone.ckpt", "--weights_only=true"]
    cli = WithoutTrainer.of(argv, "lit-rlhf look")
    assert cli.trainer is None
    assert cli.datamodule.tokenizer is cli.model.tokenizer
