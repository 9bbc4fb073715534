import copy
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, MixtralConfig

from lit_rlhf import PPO, RewardModelReward, UserError
from lit_rlhf.data.chat import stop_token_ids
from lit_rlhf.models.loading import load_policy, load_policy_with_tokenizer, load_scorer
from tests.tiny import CONFIGS, SHAPE, tiny_tokenizer

UP = "model.layers.1.mlp.up_proj.weight"
SCORE = {"score.weight": torch.ones(1, 32)}


@pytest.fixture
def changed(folder, tmp_path):
    """Makes a copy of the tiny Llama's folder, with other weights and other values in its config."""

    def make(edit=None, /, file="config.json", shards=False, **values):
        copied = shutil.copytree(folder, tmp_path / "model")
        path = copied / "model.safetensors"
        weights = load_file(path)
        if edit is not None:
            edit(weights)
        save_file(weights, path, metadata={"format": "pt"})
        if shards:
            model = AutoModelForCausalLM.from_pretrained(copied)
            path.unlink()
            model.save_pretrained(copied, max_shard_size="20KB")
        config = json.loads((copied / file).read_text())
        (copied / file).write_text(json.dumps(config | values))
        return copied

    return make


def test_weights_that_lack_a_tensor_are_refused_by_its_name(changed):
    with pytest.raises(UserError, match=r"lack 1 tensors of LlamaForCausalLM, like \['model.layers.1.mlp.up_proj"):
        load_policy(changed(lambda weights: weights.pop(UP)))


def test_a_config_of_more_layers_than_the_weights_hold_is_refused(changed):
    with pytest.raises(UserError, match=r"lack 9 tensors of LlamaForCausalLM, like \['model.layers.2"):
        load_policy(changed(num_hidden_layers=3))


@pytest.mark.parametrize("load", [load_policy, lambda name: load_scorer(name, fresh_head=True)])
def test_a_config_of_fewer_layers_than_the_weights_hold_is_refused_in_every_role(load, changed):
    with pytest.raises(UserError, match=r"leaves out 9 tensors of the weights, like \['model.layers.1.*is 1 there"):
        load(changed(num_hidden_layers=1))


@pytest.mark.parametrize("layers", [-1, 0, 10**12])
def test_a_config_without_a_layer_or_with_more_than_any_model_has_is_refused_at_once(layers, changed):
    with pytest.raises(UserError, match=rf"model: num_hidden_layers \({layers}\) in config.json must be 1 to 10000"):
        load_policy(changed(num_hidden_layers=layers))


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("config.json", {"num_attention_heads": 7}, "no model could be loaded there .*attention heads"),
        ("config.json", {"hidden_size": "x"}, "no model could be loaded there .*'hidden_size'"),
        ("config.json", {"torch_dtype": "x", "dtype": "x"}, "no model could be loaded there "),
        ("config.json", {"hidden_act": "magic"}, r"no model could .*KeyError: 'magic': what hidden_act in config.json"),
        ("config.json", {"vocab_size": 10**12}, "memory does not hold a model of the sizes in config.json"),
        ("config.json", {"max_position_embeddings": 1}, r"max_position_embeddings \(1\) in config.json must be 2 or"),
        ("generation_config.json", {"eos_token_id": [2, -7]}, "eos_token_id -7 in generation_config.json is no id"),
        ("config.json", {"architectures": 7}, r".*architectures.* (must be a list of names|expected a list)"),
        ("tokenizer.json", {"added_tokens": None}, r"no tokenizer could be loaded there \(TypeError: "),
        (
            "tokenizer_config.json",
            {"model_max_length": "x"},
            r"model_max_length \('x'\) in tokenizer_config.json must be",
        ),
    ],
)
def test_a_value_that_transformers_stumbles_over_is_told_with_the_folder(file, values, words, changed):
    folder = changed(file=file, **values)
    with pytest.raises(UserError, match=rf"{folder}: {words}"):
        load_policy_with_tokenizer(folder)


@pytest.mark.parametrize("key", ["self_attn.q_proj.bias", "self_attn.q_norm.weight"])
def test_biases_and_norms_that_the_config_denies_are_not_dropped(key, changed):
    with pytest.raises(UserError, match=rf"leaves out 1 tensors of the weights, like \['model.layers.0.{key}'\]"):
        load_policy(changed(lambda weights: weights.update({f"model.layers.0.{key}": torch.ones(32)})))


@pytest.mark.parametrize("key", ["model.norm.bias", "norm.bias", "lm_head.bias", "model.embed_tokens.scale"])
def test_a_tensor_of_the_models_own_modules_is_not_dropped(key, changed):
    with pytest.raises(UserError, match=rf"leaves out 1 tensors of the weights, like \['{key}'\]"):
        load_policy(changed(lambda weights: weights.update({key: torch.ones(32)})))


def test_the_bias_of_a_trained_head_is_not_dropped_and_the_way_to_have_it_is_told(changed):
    rated = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    shifted = changed(lambda weights: weights.update(SCORE | {"score.bias": torch.ones(1)}), **rated)
    with pytest.raises(UserError, match=r"leaves out 1 .* \['score.bias'\].* added to scores is score_bias in config"):
        load_scorer(shifted)
    load_scorer(shifted, fresh_head=True)


def test_what_is_no_part_of_the_model_is_named_and_heads_for_other_ends_are_not(changed, caplog):
    with caplog.at_level("INFO"):
        load_policy(changed(lambda weights: weights.update({"mtp.norm.weight": torch.ones(32)} | SCORE)))
    assert "1 tensors of its weights are no part of LlamaForCausalLM and left out: ['mtp.norm.weight']" in caplog.text


def test_layers_that_predict_further_tokens_may_stand_behind_the_models_own(changed):
    load_policy(changed(num_hidden_layers=1, num_nextn_predict_layers=1))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"vocab_size": 50}, r"1 tensors .* like model.embed_tokens.weight: \(40, 32\) in the weights, \(50, 32\) by"),
        ({"intermediate_size": 64}, r"6 tensors .* like .*mlp.down_proj.weight: \(32, 48\) in the weights, \(32, 64\)"),
    ],
)
def test_weights_of_other_shapes_than_the_config_are_refused_by_name_and_both_shapes(values, said, changed):
    with pytest.raises(UserError, match=said):
        load_policy(changed(**values))


def test_experts_that_the_config_does_not_count_or_that_are_missing_are_refused(tmp_path):
    config = MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"num_local_experts": 4', '"num_local_experts": 3'))
    with pytest.raises(UserError, match=r"like model.layers.0.mlp.*: \(4, .* in the weights, \(3, .* by the config"):
        load_policy(tmp_path)
    (tmp_path / "config.json").write_text(text)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop(next(key for key in weights if "experts.1." in key))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="its weights do not fit together"):
        load_policy(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_by_tensor_and_file(value, dtype, changed):
    def spoil(weights):
        weights[UP][0, 0] = value
        weights.update({key: weight.to(dtype) for key, weight in weights.items()})

    with pytest.raises(UserError, match=rf"1 tensors .* hold NaN or infinity, like {UP} in model.safetensors"):
        load_policy(changed(spoil))


def test_a_shard_that_is_not_finite_is_named(changed):
    with pytest.raises(UserError, match=rf"NaN or infinity, like {UP} in model-0000\d-of-0000\d.safetensors"):
        load_policy(changed(lambda weights: weights[UP].fill_(torch.nan), shards=True))


def test_a_score_head_that_is_not_finite_is_refused_unless_it_is_drawn_anew(changed):
    broken = changed(
        lambda weights: weights.update({"score.weight": torch.full((1, 32), torch.nan)}),
        architectures=["LlamaForSequenceClassification"],
        id2label={"0": "LABEL_0"},
    )
    with pytest.raises(UserError, match=r"NaN or infinity, like score.weight in model.safetensors"):
        load_scorer(broken)
    load_scorer(broken, fresh_head=True)


@pytest.fixture(scope="module")
def two_labels(tmp_path_factory):
    """A folder of a classifier of two labels."""
    path = tmp_path_factory.mktemp("labels") / "two"
    config = copy.deepcopy(CONFIGS["llama"])
    config.id2label = {0: "bad", 1: "good"}
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("role", ["reward", "critic"])
def test_a_classifier_of_two_labels_is_refused_by_its_labels_in_every_role(role, two_labels, folder):
    use = {
        "reward": lambda: RewardModelReward(str(two_labels)),
        "critic": lambda: PPO(str(folder), critic=str(two_labels)),
    }
    with pytest.raises(UserError, match=r"two is a classifier of 2 labels \(bad, good\); .* a head of 1 label"):
        use[role]()


def test_a_classifier_of_two_labels_gives_its_trunk_to_a_fresh_head(two_labels):
    assert load_scorer(two_labels, fresh_head=True).model.score.out_features == 1


@pytest.mark.parametrize("key", ["eos_token_id", "pad_token_id", "bos_token_id"])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("from_scratch", [False, True])
def test_special_tokens_beyond_the_vocabulary_are_refused_by_file_and_name(key, file, from_scratch, changed):
    given = [2, 9999] if key == "eos_token_id" else 9999
    with pytest.raises(UserError, match=rf"{key} 9999 in {file} is no id of the model, which embeds 40 \(0 to 39\)"):
        load_policy(changed(file=file, **{key: given}), from_scratch)


@pytest.mark.parametrize("value", ["x", [[3]], {}, 3.0, True, {"suppress_tokens": [1, "a"]}])
def test_special_tokens_that_are_no_ids_are_refused_by_file_and_name(value, changed):
    values = value if isinstance(value, dict) and value else {"eos_token_id": value}
    ((key, given),) = values.items()
    said = rf"{key} \({re.escape(repr(given))}\) in generation_config.json must be (an id, or a list|a list of ids)"
    with pytest.raises(UserError, match=said):
        load_policy(changed(file="generation_config.json", **values))


def test_no_pad_token_as_llama_says_it_is_none(changed):
    assert load_policy(changed(pad_token_id=-1)).model.config.pad_token_id == -1


def test_a_config_with_defaults_of_its_kind_alone_is_taken(tmp_path):
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    load_policy(tmp_path)


@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
    ],
)
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_damaged_file_of_settings_is_named_even_where_transformers_would_pass_over_it(file, content, changed):
    folder = changed()
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=f"{folder}: {file} is damaged, copy it anew: expected an object in JSON"):
        load_policy_with_tokenizer(folder)


def test_a_template_that_is_no_text_or_no_jinja_is_told_with_its_folder(changed):
    folder = changed()
    (folder / "chat_template.jinja").write_bytes(b"{{ '\xe9' }}")
    with pytest.raises(UserError, match=rf"{folder}: chat_template\.jinja is no text in UTF-8"):
        load_policy_with_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("{% for")
    tokenizer = load_policy_with_tokenizer(folder)[1]
    with pytest.raises(UserError, match=f"{folder}: the chat template is not valid Jinja"):
        stop_token_ids(tokenizer)


def test_a_reward_model_whose_file_lacks_its_head_is_refused_and_not_drawn_at_random(changed):
    trunk = changed(lambda weights: None, architectures=["LlamaForSequenceClassification"], id2label={"0": "LABEL_0"})
    for load in (load_scorer, lambda name: load_scorer(name, fresh_head=None)):
        with pytest.raises(
            UserError, match=r"lack 1 tensors of LlamaForSequenceClassification, like \['score.weight'\]"
        ):
            load(trunk)
    load_scorer(trunk, fresh_head=True)


@pytest.mark.parametrize("bias", ["high", float("nan"), True, None])
def test_a_shift_of_scores_that_is_no_number_is_refused_at_load(bias, changed):
    shifted = changed(
        lambda weights: weights.update(SCORE),
        architectures=["LlamaForSequenceClassification"],
        id2label={"0": "LABEL_0"},
        score_bias=bias,
    )
    with pytest.raises(UserError, match=r"score_bias \(.*\) in config.json must be a finite number"):
        load_scorer(shifted)


def test_numbers_that_are_none_and_heads_of_zeros_are_told_as_such(changed, tmp_path):
    with pytest.raises(UserError, match="LlamaForCausalLM is not supported: its hidden states are not finite"):
        load_policy(changed(rope_parameters={"rope_type": "default", "rope_theta": 0}))
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(UserError, match="is not supported: its logits are all 0"):
        load_policy(changed(lambda weights: [weight.zero_() for weight in weights.values()]))
