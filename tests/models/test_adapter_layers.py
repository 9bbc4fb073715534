import peft
import pytest
from transformers import AutoModelForSequenceClassification

from lit_rlhf import LoRA, UserError
from lit_rlhf.models.adapter_layers import candidates, leave_out, named, regex_fault, require_layers, scalar_head
from tests.tiny import CONFIGS, tiny_model


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


@pytest.mark.parametrize(
    ("pattern", "block"),
    [
        (".*", "the whole model"),
        (r".*layers.*", "model.layers"),
        (r".*self_attn(\.q_proj)?", "model.layers.0.self_attn"),
    ],
)
def test_a_pattern_that_matches_a_block_is_refused_by_the_blocks_name(pattern, block):
    with pytest.raises(UserError, match=rf"matches {block}, too, .*there are embed_tokens, q_proj"):
        require_layers(tiny_model(), config(target_modules=pattern))


def test_a_pattern_may_match_a_block_that_is_excluded_or_stands_behind_adapters():
    model = tiny_model()
    require_layers(model, config(target_modules=r".*self_attn.*", exclude_modules=r".*self_attn|.*k_proj"))
    peft.inject_adapter_in_model(config(target_modules=["q_proj"]), model)
    require_layers(model, config(target_modules=r".*q_proj.*"))


def test_a_scalar_head_is_no_layer_for_an_adapter():
    model = AutoModelForSequenceClassification.from_config(CONFIGS["llama"])
    assert scalar_head(model) == "score" and scalar_head(tiny_model()) is None
    assert set(candidates(tiny_model())) - set(candidates(model)) == {"lm_head"} and "score" not in candidates(model)
    with pytest.raises(UserError, match=r"^lora\.target_modules: score is the scalar head, which learns as a whole"):
        require_layers(model, config(target_modules=["q_proj", "score"]))
    with pytest.raises(UserError, match="matches none"):
        require_layers(model, config(target_modules="scor[e]"))


@pytest.mark.parametrize(
    ("targets", "excluded", "left"),
    [
        ("a.*", None, ["b"]),
        ("a.*", ["c"], ["c", "b"]),
        ("a.*", "c|d", "(?:c|d)|b"),
        ("all-linear", None, None),
        (["a"], None, None),
    ],
)
def test_a_layer_is_left_out_of_patterns_alone(targets, excluded, left):
    settings = config(target_modules=targets, exclude_modules=excluded)
    leave_out(settings, "b")
    assert settings.exclude_modules == left or sorted(settings.exclude_modules) == sorted(left)
    leave_out(settings, None)


def test_names_are_read_as_peft_reads_them():
    names = candidates(tiny_model())
    assert len(named(names, ["q_proj"])) == tiny_model().config.num_hidden_layers
    assert named(names, "q_proj") == [] and named(names, ["roj"]) == []
    assert named(names, "All-Linear") == names


def test_what_is_wrong_with_a_pattern_is_told():
    assert regex_fault("[a") is not None and regex_fault("a") is None
