import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lit_rlhf import UserError
from lit_rlhf.callbacks import HuggingFaceExport
from lit_rlhf.callbacks.compilation import CompileModel, compile_parts
from lit_rlhf.engine.packing import pack
from lit_rlhf.models.loading import scorer_from_policy
from lit_rlhf.models.packed_linear import packed_linears
from lit_rlhf.rollout.play import GenerationSettings, play
from tests.rollout.test_play import make_env
from tests.stages import make_stage, make_trainer
from tests.tiny import random_examples, tiny_policy

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks
BACKENDS = ["eager", pytest.param("inductor", marks=pytest.mark.slow)]  # tracing alone; code as well


@pytest.fixture(autouse=True)
def forget():
    """No compiled code outlives its test."""
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_compiled_parts_change_neither_values_nor_gradients_nor_names(architecture, backend):
    plain, compiled = tiny_policy(architecture), tiny_policy(architecture)
    assert compile_parts(compiled, backend) >= 5  # two norms or more, two MLPs, a last norm
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for seed in range(3):  # batches of other sizes
        batch = pack(random_examples(4, seed=seed))
        for policy in (plain, compiled):
            policy.zero_grad()
            policy.nll(batch).backward()
        torch.testing.assert_close(compiled(batch)[0], plain(batch)[0], rtol=1e-5, atol=1e-4)
        for theirs, ours in zip(plain.parameters(), compiled.parameters(), strict=True):
            assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm().clamp(min=1e-8)


def test_a_compiled_policy_plays_the_same_episodes():
    plain, compiled = tiny_policy(), tiny_policy()
    compile_parts(compiled, "eager")
    played, again = (play(policy, make_env(), GenerationSettings(), 8, env_seed=0) for policy in (plain, compiled))
    assert [e.response_ids.tolist() for e in played.episodes] == [e.response_ids.tolist() for e in again.episodes]


def test_layers_within_compiled_code_are_not_packed_for_rollouts():
    policy = tiny_policy()
    compile_parts(policy, "eager")
    with packed_linears(policy):
        packed = {name for name, module in policy.named_modules() if "forward" in vars(module)}
    assert any(name.endswith("q_proj") for name in packed)
    assert not any("mlp" in name for name in packed)


def fit(inputs, folder, callbacks, **options):
    module, data = make_stage("sft", inputs, lr_scheduler="constant", warmup_steps=0)
    trainer = make_trainer(folder, callbacks=callbacks, max_epochs=2)
    trainer.fit(module, data, **options)
    return module, trainer


def test_a_compiled_run_resumes_a_plain_one_and_exports_the_same_model(inputs, tmp_path):
    plain, trainer = fit(inputs, tmp_path / "plain", [HuggingFaceExport()])
    compiled, _ = fit(inputs, tmp_path / "compiled", [HuggingFaceExport(), CompileModel("eager")])
    for (name, theirs), (same, ours) in zip(plain.named_parameters(), compiled.named_parameters(), strict=True):
        assert name == same
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "compiled" / "model")
    assert list(exported.state_dict()) == list(compiled.policy.model.state_dict())
    resumed, _ = fit(inputs, tmp_path / "resumed", [CompileModel("eager")], ckpt_path=tmp_path / "last.ckpt")
    for theirs, ours in zip(plain.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)  # the checkpoint was of the last step


def test_every_network_of_a_stage_is_compiled_once(inputs, tmp_path):
    module, data = make_stage("ppo", inputs)
    make_trainer(tmp_path, max_epochs=1, callbacks=[CompileModel("eager"), CompileModel("eager")]).fit(module, data)
    for network in module.networks():
        assert all(m._compiled_call_impl is not None for m in network.modules() if type(m).__name__.endswith("MLP"))
    assert compile_parts(scorer_from_policy(module.policy), "eager") > 0  # a copy of a compiled trunk


def test_a_model_without_such_parts_is_refused(inputs, tmp_path):
    module, _ = make_stage("sft", inputs)
    module.policy = nn.Linear(2, 2)
    with pytest.raises(UserError, match="CompileModel found nothing to compile in Linear"):
        CompileModel("eager").setup(make_trainer(tmp_path), module, "fit")
