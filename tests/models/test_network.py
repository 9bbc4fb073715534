import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_rlhf import LoRA
from lit_rlhf.models.loading import load_policy
from lit_rlhf.models.roles import add_critic
from tests.models.adapted import adapted_policy
from tests.models.test_adapter_folders import pytestmark, save_adapter
from tests.tiny import save_tiny, tiny_policy

__all__ = ["pytestmark"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base and an adapter of it."""
    root = tmp_path_factory.mktemp("network")
    save_adapter(root / "adapter", save_tiny(root / "base"))
    return root


def test_without_adapters_a_state_dict_is_whole():
    policy = tiny_policy()
    assert policy.state_dict().keys() == {f"model.{name}" for name in policy.model.state_dict()}
    policy.load_state_dict(policy.state_dict())


def test_the_heads_adapters_are_those_that_are_on():
    policy = adapted_policy()
    policy.switch()
    assert policy.head.on == ("policy",) and policy.head.out_features == policy.vocabulary_size
    policy.switch(())
    assert policy.head is policy.model.get_output_embeddings().base_layer


def test_state_dicts_hold_what_learns_and_load_without_the_rest(runs):
    policy = load_policy(runs / "adapter", lora=LoRA(r=2))
    add_critic(policy, "adapter", LoRA(r=2), None)
    state = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    assert set(state) == {name for name, p in policy.named_parameters() if p.requires_grad}
    other = load_policy(runs / "adapter", lora=LoRA(r=2))
    add_critic(other, "adapter", LoRA(r=2), None)
    base = [p.clone() for p in other.parameters() if not p.requires_grad]
    other.load_state_dict(state)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in state.items())
    assert all(map(torch.equal, base, [p for p in other.parameters() if not p.requires_grad]))
    state.pop(next(iter(state)))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(state)


def test_positions_stay_exact_when_a_network_is_cast(runs):
    """Rotary frequencies in bfloat16 put position 60 elsewhere; transformers keeps them in float32, and so do we."""
    cast = load_policy(runs / "base").to(torch.bfloat16)
    exact = AutoModelForCausalLM.from_pretrained(runs / "base", dtype=torch.bfloat16)
    ours, theirs = cast.model.model.rotary_emb.inv_freq, exact.model.rotary_emb.inv_freq
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
    cast.model.set_attn_implementation("eager")
    exact.set_attn_implementation("eager")
    ids = torch.arange(60)[None] % 40
    with torch.no_grad():
        assert torch.equal(cast.model.eval()(ids).logits, exact.eval()(ids).logits)
    assert {p.dtype for p in cast.parameters()} == {torch.bfloat16}
