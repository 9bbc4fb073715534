"""Distillation on data and on policy, against whole tensors and the teacher itself."""

import pytest
import torch

from lit_rlhf import Distillation, LoRA, OnPolicyDistillation, SFTDataModule, UserError
from lit_rlhf.losses import forward_kl, reverse_kl
from lit_rlhf.models.trunk import packed_outputs
from tests.ppo_runs import Rollouts, make, record
from tests.stages import make_trainer
from tests.tiny import save_tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("teacher") / "model", seed=7))


def offline(inputs, teacher, **options):
    module = Distillation(str(inputs / "model"), teacher, **({"learning_rate": 1e-2} | options))
    rows = str(inputs / "sft.jsonl")
    return module, SFTDataModule(train=rows, validation=rows, max_tokens=100, tokenizer=module.tokenizer)


def whole_logprobs(policy, packed):
    """(M, V), the tensor that training never makes."""
    hidden, _ = packed_outputs(policy.model, packed.input_ids, packed.position_ids, packed.layout)
    logits = policy.model.get_output_embeddings()(hidden[packed.predictors])
    kept = [v for v in range(logits.shape[1]) if policy.unused_ids is None or v not in policy.unused_ids]
    return torch.log_softmax(logits[:, kept], -1)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_the_gradient_is_that_of_whole_distributions(divergence, inputs, teacher):
    module, data = offline(inputs, teacher, divergence=divergence)
    data.setup("fit")
    batch = next(iter(data.rows_dataloader("train")))
    losses = module.policy.divergence(batch.packed, module.teacher.network, module.divergence)
    with torch.no_grad():
        of_teacher = whole_logprobs(module.teacher.network, batch.packed)
    expected = divergence(of_teacher, whole_logprobs(module.policy, batch.packed))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    parameters = list(module.policy.parameters())
    ours = torch.autograd.grad(3 * losses.sum(), parameters)
    for mine, theirs in zip(ours, torch.autograd.grad(3 * expected.sum(), parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lora", [None, LoRA(r=4)], ids=["all", "adapter"])
def test_it_comes_nearer_to_a_teacher_that_stays_as_it_is(lora, inputs, teacher, tmp_path):
    module, data = offline(inputs, teacher, lora=lora)
    before = [p.clone() for p in module.teacher.network.parameters()]
    trainer = make_trainer(tmp_path, max_epochs=4, limit_val_batches=1.0)
    trainer.validate(module, data, verbose=False)
    start = trainer.callback_metrics["val/loss"].item()
    trainer.fit(module, data)
    assert trainer.callback_metrics["val/loss"].item() < 0.8 * start
    assert all(torch.equal(a, b) for a, b in zip(before, module.teacher.network.parameters(), strict=True))
    assert set(module.views()) == {"policy", "teacher"} and not any("teacher" in name for name in module.state_dict())


def test_on_policy_it_learns_from_its_own_responses_and_no_reward(folder, teacher, tmp_path):
    sizes = {"data": {"rollout_size": 32}, "num_minibatches": 2}
    module = record(folder, tmp_path, kind=OnPolicyDistillation, teacher=teacher, **sizes)
    assert sum(batch.packed.num_sequences for batch, _ in module.seen) == 32
    assert set(module.views()) == {"policy", "teacher"}
    assert module.rollout_metrics["rollout/kl"] > 0.1  # to the teacher, which the student was not

    rollouts = Rollouts()
    module, data, trainer = make(
        folder,
        tmp_path,
        kind=OnPolicyDistillation,
        teacher=teacher,
        learning_rate=1e-2,
        data={"rollout_size": 64, "num_slots": 32},
        trainer={"max_epochs": 6, "callbacks": [rollouts]},
    )
    trainer.fit(module, data)
    assert rollouts.metrics[-1]["rollout/kl"] < 0.7 * rollouts.metrics[0]["rollout/kl"]


def test_a_teacher_of_other_words_and_a_temperature_of_nothing_are_refused(inputs, teacher, tmp_path):
    with pytest.raises(UserError, match=r"^temperature \(0\.0\) must be more than 0 and finite: distributions are"):
        offline(inputs, teacher, temperature=0.0)
    with pytest.raises(UserError, match=r"^model\.teacher: "):
        offline(inputs, str(tmp_path / "nothing"))
    other = save_tiny(tmp_path / "other")
    tiny_tokenizer(missing="w9").save_pretrained(other)
    for kind in (Distillation, OnPolicyDistillation):
        with pytest.raises(UserError, match=r"^teacher \S+/other was trained with another tokenizer than .*[^\n]+$"):
            kind(str(inputs / "model"), str(other))
