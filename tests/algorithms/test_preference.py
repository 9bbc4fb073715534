import pytest

from tests.stages import make_stage, make_trainer


def test_validation_metrics_are_means_over_pairs_not_over_batches(inputs, tmp_path):
    means = []
    for budget in (100, 10_000):
        module, data = make_stage("dpo", inputs)
        data.max_tokens = budget
        trainer = make_trainer(tmp_path, limit_val_batches=1.0)
        trainer.validate(module, data, verbose=False)
        means.append(trainer.callback_metrics["val/chosen_logprobs"].item())
    assert means[0] == pytest.approx(means[1], rel=1e-5)
