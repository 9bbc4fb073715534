import pytest

from lit_rlhf import LoRA, UserError
from lit_rlhf.models.adapter_layers import candidates, named, regex_fault, require_layers
from tests.tiny import tiny_model


def config(**options):
    return LoRA(r=2, **options).config("base", "CAUSAL_LM")


@pytest.mark.parametrize(
    ("targets", "excluded"),
    [
        (["q_proj"], ["q_proj"]),
        ("q_proj", "q_proj"),
        (["q_proj", "k_proj"], r".*self_attn\..*"),
        (r".*\.q_proj", ["self_attn.q_proj"]),
        ("all-linear", r".*"),
        ("all-linear", [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]),
    ],
)
def test_exclusions_that_leave_no_layer_are_refused(targets, excluded):
    with pytest.raises(
        UserError, match=r"^lora\.exclude_modules \(.*\) leaves no layer of lora\.target_modules \(.*q_proj"
    ):
        require_layers(tiny_model(), config(target_modules=targets, exclude_modules=excluded))


@pytest.mark.parametrize("excluded", [["k_proj"], r".*layers\.0\..*", None])
def test_exclusions_that_leave_layers_are_taken(excluded):
    require_layers(tiny_model(), config(target_modules=["q_proj", "k_proj"], exclude_modules=excluded))


def test_names_are_read_as_peft_reads_them():
    names = candidates(tiny_model())
    assert len(named(names, ["q_proj"])) == tiny_model().config.num_hidden_layers
    assert named(names, "q_proj") == [] and named(names, ["roj"]) == []
    assert named(names, "All-Linear") == names


def test_what_is_wrong_with_a_pattern_is_told():
    assert regex_fault("[a") is not None and regex_fault("a") is None
