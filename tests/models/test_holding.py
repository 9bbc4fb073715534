import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig

from lit_rlhf import SFT, LoRA, UserError
from lit_rlhf.models.holding import dtype_by, in_float32, reading_in, require_bitsandbytes, require_precision
from lit_rlhf.models.loading import load_policy, load_scorer
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.probe import choose_attention, disable_dropout
from lit_rlhf.models.trunk import runs_packed
from tests.models.test_adapter_folders import pytestmark, save_adapter
from tests.tiny import CONFIGS, SHAPE, SINKS, plain_response_logprobs, random_examples, save_tiny, spread_model

__all__ = ["pytestmark"]
STRANGE = {"sinks": SINKS, "asks a part for its dtype": MambaConfig(**{**SHAPE, "intermediate_size": 64}, state_size=4)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder of a tiny model."""
    return save_tiny(tmp_path_factory.mktemp("held") / "base")


def dtypes(network, trained):
    """Those of the weights that learn, or of the others."""
    return {p.dtype for p in network.parameters() if p.requires_grad == trained}


def test_weights_that_stay_are_held_in_the_dtype_asked_for_and_what_learns_in_float32(base, tmp_path):
    policy = load_policy(base, lora=LoRA(r=2), frozen_dtype="bfloat16")
    assert dtypes(policy, trained=False) == {torch.bfloat16} and dtypes(policy, trained=True) == {torch.float32}
    save_adapter(tmp_path / "adapter", base)
    for further in ({}, {"lora": LoRA(r=2)}, {"lora": LoRA(r=2), "merge_start": True}):
        scorer = load_scorer(tmp_path / "adapter", True, frozen_dtype="bfloat16", **further)
        rest = {p.dtype for n, p in scorer.named_parameters() if "lora_" not in n and not p.requires_grad}
        assert rest == {torch.bfloat16} and dtypes(scorer, trained=True) == {torch.float32}
    assert dtypes(load_policy(base, frozen_dtype="bfloat16"), trained=True) == {torch.float32}
    merged = load_policy(tmp_path / "adapter", merge_start=True, frozen_dtype="bfloat16")
    assert dtypes(merged, trained=True) == {torch.float32}
    rests = load_policy(base, frozen_dtype="bfloat16", learns=False)
    assert {p.dtype for p in rests.parameters()} == {torch.bfloat16}


def test_an_adapter_is_merged_in_float32_before_its_base_is_cast(base, tmp_path):
    save_adapter(tmp_path / "adapter", base, spread=0.003)  # which bfloat16 would mostly round away, added to it
    options = {"merge_start": True, "lora": LoRA(r=2)}
    with reading_in(torch.bfloat16):
        held = load_policy(tmp_path / "adapter", frozen_dtype="bfloat16", **options)
    exact = load_policy(tmp_path / "adapter", **options)
    name = "model.model.layers.0.mlp.down_proj.base_layer.weight"
    assert torch.equal(held.get_parameter(name), exact.get_parameter(name).bfloat16())


def test_log_probs_on_a_base_in_half_precision_are_those_of_peft(base, tmp_path):
    import peft

    from lit_rlhf.engine.packing import pack

    save_adapter(tmp_path / "adapter", base)
    ours = load_policy(tmp_path / "adapter", frozen_dtype="bfloat16")
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), tmp_path / "adapter"
    )
    assert {p.dtype for n, p in theirs.named_parameters() if "lora_" in n} == {torch.float32}
    examples = random_examples(5)
    with torch.no_grad():
        found = ours(pack(examples))[0]
        expected = torch.cat(
            [
                plain_response_logprobs(theirs.base_model.model, e.prompt_ids, r, "eager")
                for e in examples
                for r in e.responses
            ]
        )
        exact = load_policy(tmp_path / "adapter")(pack(examples))[0]
    torch.testing.assert_close(found, expected.float(), atol=0.03, rtol=0)
    assert not torch.equal(found, exact)


@pytest.mark.parametrize("name", [*CONFIGS, *STRANGE])
def test_a_model_in_half_precision_is_judged_as_in_float32_and_left_as_it_was_to_the_bit(name):
    model = spread_model((CONFIGS | STRANGE)[name], "eager", 0)
    disable_dropout(model)
    judged = []
    for half in (False, True):
        policy = Policy(copy.deepcopy(model))
        policy = policy.to(torch.bfloat16) if half else policy
        before = {key: tensor.clone() for key, tensor in policy.state_dict().items()}
        choose_attention(policy, name)
        judged.append((runs_packed(policy.model), policy.quiet, policy.scale, policy.caching))
        after = policy.state_dict()
        assert all(
            torch.equal(after[key], tensor) and after[key].dtype == tensor.dtype for key, tensor in before.items()
        )
    assert judged[0] == judged[1]


def test_blocks_are_in_float32_for_their_own_passes_alone():
    policy = Policy(spread_model(CONFIGS["llama"], "eager", 0)).to(torch.bfloat16)
    wide = []

    def count(module, args):
        wide.append(sum(p.numel() for p in policy.parameters() if p.dtype == torch.float32))

    blocks = policy.model.model.layers
    with torch.no_grad(), in_float32(policy.model, whole=False):
        for block in blocks:  # behind the hooks that cast
            block.register_forward_pre_hook(count)
        out = policy.model(torch.arange(5)[None]).logits
    assert out.dtype == torch.float32
    assert wide == [sum(p.numel() for p in block.parameters()) for block in blocks]


@pytest.mark.parametrize(
    ("frozen_dtype", "precision", "goes"),
    [
        ("bfloat16", "32-true", True),
        ("bfloat16", "bf16-mixed", True),
        ("nf4", "bf16-mixed", True),
        ("bfloat16", "bf16-true", True),
        ("float32", "bf16-true", False),
        ("float32", "16-mixed", True),
        ("bfloat16", "16-mixed", False),
        ("bfloat16", "16-true", False),
        ("float32", "64-true", False),
        (None, "64-true", True),
    ],
)
def test_a_precision_that_would_undo_the_dtype_of_frozen_weights_is_refused(frozen_dtype, precision, goes):
    if goes:
        require_precision(frozen_dtype, precision)
    else:
        with pytest.raises(UserError, match=rf"frozen_dtype \({frozen_dtype}\) and trainer.precision \({precision}\)"):
            require_precision(frozen_dtype, precision)


def test_weights_that_learn_are_read_in_what_the_precision_holds(base):
    assert dtype_by("bf16-true") == torch.bfloat16 and dtype_by("bf16-mixed") == dtype_by(None) == torch.float32
    with reading_in(torch.bfloat16):
        policy = load_policy(base)
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


def test_what_is_no_dtype_is_refused_and_a_package_that_is_not_there_named(base, monkeypatch):
    with pytest.raises(UserError, match=r"frozen_dtype \(int3\) must be one of float32, bfloat16, nf4, or null"):
        load_policy(base, frozen_dtype="int3")
    monkeypatch.setattr("lit_rlhf.models.holding.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"nf4 needs bitsandbytes, .*: pip install '\.\[quantized\]' in a checkout"):
        SFT("no folder", lora=LoRA(r=2), frozen_dtype="nf4")
    with pytest.raises(UserError, match="optimizer: adamw_8bit needs"):
        require_bitsandbytes("optimizer: adamw_8bit")
