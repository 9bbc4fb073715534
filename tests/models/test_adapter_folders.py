import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_rlhf import LoRA, UserError
from lit_rlhf.models.adapter_folders import BIAS_FILE, base_of, plain_config, saved_adapter
from lit_rlhf.models.loading import load_policy, load_scorer
from tests.models.adapted import KINDS, linear_names, relative
from tests.tiny import plain_logits, save_tiny


def save_adapter(folder, base, seed=1, task="CAUSAL_LM", spread=0.1, **options):
    """A folder as PEFT itself writes it, of an adapter that has learnt."""
    kind = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForCausalLM
    model = kind.from_pretrained(base, **({"num_labels": 1} if task == "SEQ_CLS" else {}))
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": task} | options)
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "lora_" in name:
            parameter.data += spread * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder)
    return folder


def logits(folder, base, ids):
    """(S, V) as PEFT computes them."""
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    with torch.no_grad():
        return model(torch.as_tensor(ids)[None]).logits[0]


# What PEFT itself warns of, where a test calls it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:.*fan_in_fan_out.*"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated", "ignore:.*tied_target_modules.*"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]
IDS = [5, 9, 12, 7, 30]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_an_adapter_that_peft_wrote_gives_the_numbers_of_peft(architecture, kind, tmp_path):
    base = save_tiny(tmp_path / "base", architecture)
    save_adapter(tmp_path / "adapter", base, **KINDS[kind], target_modules=linear_names(architecture))
    policy = load_policy(tmp_path / "adapter")
    with torch.no_grad():
        assert relative(plain_logits(policy.model, IDS), logits(tmp_path / "adapter", base, IDS)) < 1e-5


def test_a_base_is_found_from_the_adapters_folder_and_from_here(tmp_path, monkeypatch):
    save_tiny(tmp_path / "runs" / "base")
    (tmp_path / "runs" / "adapter").mkdir()
    monkeypatch.chdir(tmp_path)
    whole = str(tmp_path / "runs" / "base")
    assert base_of("runs/adapter", "../base") == whole
    assert base_of("runs/adapter", "runs/base") == whole
    assert base_of("elsewhere", whole) == whole
    assert base_of("runs/adapter", "owner/name") == "owner/name"
    (tmp_path / "runs" / "adapter" / "adapter_config.json").write_text("{}")
    for adapter in ("runs/adapter", "."):
        with pytest.raises(UserError, match=r"^runs/adapter: its base, '.*' in .*, is an adapter itself: export"):
            base_of("runs/adapter", adapter)
    for missing in ("../gone", "/no/such/folder", "", None):
        with pytest.raises(UserError, match=r"runs/adapter: its base, .* is not there; write where it is now"):
            base_of("runs/adapter", missing)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, r"another kind \(IA3\)"),
        ({"modules_to_save": ["embed_tokens"]}, r"LoRA with embed_tokens"),
        ({"bias": "all"}, r"LoRA with bias"),
        ({"lora_bias": True}, r"LoRA with lora_bias"),  # it would be lost in the sum with another on top
        ({"trainable_token_indices": [1]}, r"LoRA with trainable_token_indices"),
        ({"init_lora_weights": "pissa_niter_4"}, r"pissa_niter_4, which changes the base"),
        ({"r": "eight"}, r"adapter: r \('eight'\) in adapter_config.json must be a number above 0"),
        ({"r": 10**9}, r"adapter: r \(1000000000\) in adapter_config.json"),
        ({"lora_alpha": None}, r"adapter: lora_alpha \(None\) in adapter_config.json must be a number above 0"),
        ({"target_modules": ["nope"]}, r"adapter: adapter_config.json: Target modules \{'nope'\} not found"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_by_what_it_is(settings, message, tmp_path):
    folder = save_adapter(tmp_path / "adapter", save_tiny(tmp_path / "base"))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(UserError, match=message):
        load_policy(folder)


def test_an_adapter_beside_a_whole_model_is_refused(tmp_path):
    folder = save_adapter(save_tiny(tmp_path / "base"), tmp_path / "base")
    with pytest.raises(UserError, match="holds a whole model and an adapter of PEFT"):
        load_policy(folder)


def test_an_adapter_without_a_base_or_without_weights_says_so(tmp_path):
    folder = save_adapter(tmp_path / "adapter", save_tiny(tmp_path / "base"))
    shutil.copytree(folder, tmp_path / "cut")
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (tmp_path / "cut" / "adapter_model.safetensors").write_bytes(weights[:1000])
    (folder / "adapter_model.safetensors").unlink()
    for broken in (folder, tmp_path / "cut"):
        with pytest.raises(UserError, match=r"no adapter could be loaded there .* expected adapter_model") as caught:
            load_policy(broken)
        assert "https://" not in str(caught.value) and "the folder holds ['README.md'" in str(caught.value)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="names no base_model_name_or_path"):
        load_policy(folder)


def test_a_file_that_lacks_weights_is_refused(tmp_path):
    folder = save_adapter(tmp_path / "adapter", save_tiny(tmp_path / "base"))
    file = folder / "adapter_model.safetensors"
    held = load_file(file)
    held.pop(next(iter(held)))
    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="the adapter's file lacks 1 weights that its config names"):
        load_policy(folder)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"target_modules": ["q_proj"]},
            r"holds \d+ of \d+ weights that adapter_config.json does not name, like model\.",
        ),
        ({"target_modules": None}, r"holds \d+ of \d+ weights that adapter_config.json does not name, like model\."),
        ({"use_dora": False}, r"holds \d+ of \d+ weights .* like model\.layers\.0\.\S+\.lora_magnitude_vector"),
        ({"r": 8}, r"holds model\.layers\.0\.\S+ in rank 4, and adapter_config.json says 8: correct r"),
        ({"rank_pattern": {"q_proj": 2}}, r"holds model\.layers\.0\.self_attn\.q_proj in rank 4, .* says 2: correct r"),
    ],
)
def test_weights_of_an_adapter_that_its_config_does_not_cover_are_refused_by_name(settings, said, tmp_path):
    folder = save_adapter(tmp_path / "adapter", save_tiny(tmp_path / "base"), r=4, use_dora="use_dora" in settings)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(UserError, match=f"adapter: the adapter's file {said}"):
        load_policy(folder)


def test_weights_of_an_adapter_that_are_not_finite_are_refused(tmp_path):
    folder = save_adapter(tmp_path / "adapter", save_tiny(tmp_path / "base"))
    file = folder / "adapter_model.safetensors"
    held = load_file(file)
    next(iter(held.values()))[0, 0] = torch.nan
    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors of its adapter_model.safetensors hold NaN or infinity, like base"):
        load_policy(folder)


def test_a_reward_models_adapter_without_its_head_is_refused_and_not_drawn_at_random(tmp_path):
    folder = save_adapter(tmp_path / "adapter", save_tiny(tmp_path / "base"))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": "SEQ_CLS"}))
    with pytest.raises(UserError, match=r"adapter: its adapter_model.safetensors holds no scalar head"):
        load_scorer(folder)
    load_scorer(folder, fresh_head=True)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"score_bias": "x"}'])
def test_a_damaged_shift_of_scores_is_named(content, tmp_path):
    folder = save_adapter(tmp_path / "adapter", save_tiny(tmp_path / "base"))
    (folder / BIAS_FILE).write_text(content)
    with pytest.raises(UserError, match=r"adapter: .*score_bias"):
        _ = saved_adapter(folder).bias


def test_settings_as_plain_values_are_what_peft_reads(tmp_path):
    config = LoRA(target_modules=["q_proj", "v_proj"]).config("base", "SEQ_CLS")
    plain = json.loads(json.dumps(plain_config(config)))
    assert plain["target_modules"] == ["q_proj", "v_proj"] and plain["peft_type"] == "LORA"
    assert peft.LoraConfig(**plain) == config


def test_a_folder_without_an_adapter_has_none(folder):
    assert saved_adapter(folder) is None and saved_adapter("demo") is None
