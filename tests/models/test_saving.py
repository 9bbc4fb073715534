"""An export in plain transformers: it stops where the run stopped, pads beside the text, and has not grown."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    Llama4Config,
    Llama4ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from lit_rlhf import PPO, SFT, LoRA, RewardModel, RewardModelReward, UserError
from lit_rlhf.callbacks.export import export
from lit_rlhf.engine.sharding import full_state_dict
from lit_rlhf.models.loading import load_policy
from lit_rlhf.models.saving import LARGEST
from tests.tiny import EOS, SHAPE, VOCABULARY, save_tiny, tiny_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|> ' + m['role'] + ' ' + m['content'] + ' <|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)
TEXTS = ["w5 w6 w7 </s>", "w8 </s>", "w9 w10 w11 w12 w13 w14 w15 </s>", "w5 w6"]


def exported(module, folder):
    export(module, full_state_dict(module.exportable()), folder)
    return folder


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def one_special_token(folder):
    """As GPT-2: a single special token, which begins, ends and stands for the unknown; none to pad with."""
    words = Tokenizer(models.WordLevel({"</s>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>")
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    change(folder / "config.json", bos_token_id=0, eos_token_id=0, pad_token_id=None)


def pad_is(token):
    def edit(folder):
        change(folder / "tokenizer_config.json", pad_token=token)

    return edit


def unknown_pads(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"unk_token": "w39"})
    tokenizer.pad_token = "w39"
    tokenizer.save_pretrained(folder)


def padded_vocabulary(folder):
    """More embeddings than tokens, as models that pad their vocabulary to a round number."""
    one_special_token(folder)
    weights = load_file(folder / "model.safetensors")
    more = torch.full((8, 32), 3.0)
    weights = {name: torch.cat([w, more]) if len(w) == VOCABULARY else w for name, w in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    change(folder / "config.json", vocab_size=VOCABULARY + 8)


def pads_left(folder):
    change(folder / "tokenizer_config.json", padding_side="left")


TOKENIZERS = {
    "no pad token": pad_is(None),
    "pad is the end": pad_is("</s>"),
    "pad is unknown": unknown_pads,
    "one special token": one_special_token,
    "padded vocabulary": padded_vocabulary,
    "padding on the left": pads_left,
}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_padded_batch_of_a_reward_model_scores_as_each_text_alone(tmp_path, architecture, tokenizer):
    TOKENIZERS[tokenizer](save_tiny(tmp_path / "lm", architecture))
    module = RewardModel(str(tmp_path / "lm"))
    folder = exported(module, tmp_path / "rm")
    words, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    model.eval()
    assert words.pad_token_id == model.config.pad_token_id not in (None, words.eos_token_id)
    with torch.no_grad():
        alone = torch.cat([model(**words(text, return_tensors="pt")).logits[:, 0] for text in TEXTS])
        batch = model(**words(TEXTS, padding=True, return_tensors="pt")).logits[:, 0]
    assert alone.std() > 0.01
    torch.testing.assert_close(batch, alone, rtol=0, atol=1e-5)

    reward = RewardModelReward(str(folder))  # and as this library scores them, for a policy without that pad token
    reward.bind(AutoTokenizer.from_pretrained(tmp_path / "lm"), torch.device("cpu"))
    ids = [np.array(words(text)["input_ids"]) for text in TEXTS]
    ours = reward([row[:-1] for row in ids], [row[-1:] for row in ids]) - model.config.score_bias
    torch.testing.assert_close(torch.tensor(ours).float(), alone, rtol=0, atol=1e-5)
    PPO(str(tmp_path / "lm"), critic=str(folder))


def test_a_pad_token_that_ends_responses_elsewhere_is_none_for_a_reward_model(tmp_path):
    folder = save_tiny(tmp_path / "lm")
    GenerationConfig(eos_token_id=[EOS, 0]).save_pretrained(folder)  # as Qwen: the pad token stops a base model
    assert AutoTokenizer.from_pretrained(exported(RewardModel(str(folder)), tmp_path / "rm")).pad_token == "<s>"


def test_a_further_special_token_pads_where_all_that_a_tokenizer_names_end_responses(tmp_path):
    """As Qwen3, without a beginning and an unknown token; beside an adapter a new one would have no embedding."""
    folder = save_tiny(tmp_path / "lm")
    GenerationConfig(eos_token_id=[EOS, 0]).save_pretrained(folder)
    change(folder / "tokenizer_config.json", bos_token=None, unk_token=None, extra_special_tokens=["w38", "w39"])
    scorer = exported(RewardModel(str(folder), lora=LoRA(r=2)), tmp_path / "rm")
    assert AutoTokenizer.from_pretrained(scorer).pad_token == "w39"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_generate_stops_where_the_run_does(tmp_path, architecture):
    folder = save_tiny(tmp_path / "lm", architecture)
    GenerationConfig(eos_token_id=[EOS, 33], temperature=0.6, top_p=0.9, do_sample=True).save_pretrained(folder)
    words = tiny_tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["w30", "w31"]})
    words.chat_template = CHATML.replace("<|im_start|>", "w30").replace("<|im_end|>", "w31")
    words.save_pretrained(folder)
    folder = exported(SFT(str(folder)), tmp_path / "out")
    model, defaults = AutoModelForCausalLM.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
    assert defaults.eos_token_id == [EOS, 31, 33] and defaults.pad_token_id == 0
    assert (defaults.temperature, defaults.top_p, defaults.do_sample) == (0.6, 0.9, True)
    assert AutoTokenizer.from_pretrained(folder).chat_template == words.chat_template
    assert (folder / "chat_template.jinja").read_text() == words.chat_template

    def always(module, arguments, logits):
        logits[..., 31] = 1e4
        return logits

    model.get_output_embeddings().register_forward_hook(always)
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=9).tolist() == [[5, 6, 7, 31]]


def test_end_tokens_that_config_json_alone_names_stop_generate(tmp_path):
    folder = save_tiny(tmp_path / "lm")
    (folder / "generation_config.json").unlink()
    change(folder / "config.json", eos_token_id=[EOS, 33])
    assert GenerationConfig.from_pretrained(exported(SFT(str(folder)), tmp_path / "out")).eos_token_id == [EOS, 33]


def test_a_policy_keeps_its_tokenizer_as_it_was_and_generate_has_something_to_pad_with(tmp_path):
    one_special_token(save_tiny(tmp_path / "lm", "gpt2"))
    folder = exported(SFT(str(tmp_path / "lm")), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    assert GenerationConfig.from_pretrained(folder).pad_token_id == 0
    assert json.loads((folder / "config.json").read_text()).get("pad_token_id") is None  # its embedding would not learn


def test_generate_leaves_out_the_ids_that_stand_for_no_token_as_the_run_did(tmp_path):
    padded_vocabulary(save_tiny(tmp_path / "lm"))
    change(tmp_path / "lm" / "generation_config.json", suppress_tokens=[7])
    folder = exported(SFT(str(tmp_path / "lm")), tmp_path / "out")
    assert GenerationConfig.from_pretrained(folder).suppress_tokens == [7, *range(VOCABULARY, VOCABULARY + 8)]
    torch.manual_seed(0)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 20, "num_return_sequences": 50, "eos_token_id": 0}
    generated = AutoModelForCausalLM.from_pretrained(folder).generate(torch.tensor([[5, 6, 8]]), **options)
    assert generated.max() < VOCABULARY and 7 not in generated
    free = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    assert free.generate(torch.tensor([[5, 6, 8]]), **options).max() >= VOCABULARY


def test_sampling_defaults_that_transformers_publishes_and_does_not_save_are_exported_as_they_are(tmp_path):
    folder = save_tiny(tmp_path / "lm")  # as Llama 2 was published
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}')
    defaults = json.loads((exported(SFT(str(folder)), tmp_path / "out") / "generation_config.json").read_text())
    assert (defaults["temperature"], defaults["top_p"], defaults.get("do_sample")) == (0.9, 0.6, None)


def test_random_weights_in_the_shape_of_a_folder_have_its_stop_tokens_and_are_float32_in_memory(tmp_path):
    folder = save_tiny(tmp_path / "lm")
    GenerationConfig(eos_token_id=[EOS, 33]).save_pretrained(folder)
    change(folder / "config.json", dtype="bfloat16")
    module = SFT(str(folder), from_scratch=True)
    assert module.policy.model.dtype == torch.float32
    assert GenerationConfig.from_pretrained(exported(module, tmp_path / "out")).eos_token_id == [EOS, 33]


def stored_dtypes(folder):
    with safe_open(folder / "model.safetensors", "pt") as weights:
        return {weights.get_tensor(name).dtype for name in weights.keys()}  # noqa: SIM118


@pytest.mark.parametrize("kind", [SFT, RewardModel])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("said", [True, False])
def test_an_export_has_the_dtype_of_its_source_and_training_float32(tmp_path, kind, dtype, said):
    folder = save_tiny(tmp_path / "lm")
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    if not said:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    module = kind(str(folder))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    made = exported(module, tmp_path / "out")
    auto = AutoModelForCausalLM if kind is SFT else AutoModelForSequenceClassification
    assert stored_dtypes(made) == {dtype} == {auto.from_pretrained(made, dtype="auto").dtype}
    head = 32 * dtype.itemsize * (kind is RewardModel)
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, made)]
    assert sizes[1] - sizes[0] - head == pytest.approx(0, abs=200), "tied embeddings are stored once"


def test_tied_embeddings_that_no_longer_share_memory_are_stored_once(tmp_path):
    module = SFT(str(save_tiny(tmp_path / "lm")))
    weights = {name: tensor.clone() for name, tensor in full_state_dict(module.exportable()).items()}  # as from a GPU
    assert "lm_head.weight" in weights
    export(module, weights, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as stored:
        assert "lm_head.weight" not in stored.keys()  # noqa: SIM118
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_ruined_weights_are_refused_and_the_older_export_stays(tmp_path, value):
    module = SFT(str(save_tiny(tmp_path / "lm")))
    before = (exported(module, tmp_path / "out") / "model.safetensors").read_bytes()
    with torch.no_grad():
        module.policy.model.model.layers[1].mlp.up_proj.weight[3, 3] = value
    with pytest.raises(
        UserError, match=r"1 of \d+ weights are ruined, like model.layers.1.mlp.up_proj.weight \((nan|inf|1e\+30)"
    ):
        exported(module, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lm", "out"]


def test_large_weights_are_taken_up_to_what_float16_holds(tmp_path):
    module = SFT(str(save_tiny(tmp_path / "lm")))
    with torch.no_grad():
        module.policy.model.model.norm.weight[0] = LARGEST
    exported(module, tmp_path / "out")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_all_files_can_be_read_by_those_whom_the_umask_lets(tmp_path, umask):
    before = os.umask(umask)
    try:
        folder = exported(RewardModel(str(save_tiny(tmp_path / "lm"))), tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in Path(folder).iterdir()}
    assert "model.safetensors" in modes and set(modes.values()) == {0o666 & ~umask}
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask


def test_half_of_a_model_is_taken_with_a_word(tmp_path):
    text = SHAPE | {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}
    vision = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4, "vision_output_dim": 16, "projector_input_dim": 16}
    vision |= {"projector_output_dim": 16}
    torch.manual_seed(0)
    Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision)).save_pretrained(tmp_path)
    with pytest.warns(
        UserWarning, match="a model of text and more; what is loaded, trained and exported is its Llama4"
    ):
        load_policy(tmp_path)


def test_a_model_of_text_and_images_is_exported_whole(tmp_path):
    text = SHAPE | {"num_key_value_heads": 2, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=39)
    whole = Gemma3ForConditionalGeneration(config)
    whole.save_pretrained(tmp_path / "lm")
    tiny_tokenizer().save_pretrained(tmp_path / "lm")
    (tmp_path / "lm" / "processor_config.json").write_text('{"image_seq_length": 4}')
    folder = exported(SFT(str(tmp_path / "lm")), tmp_path / "out")
    loaded = Gemma3ForConditionalGeneration.from_pretrained(folder)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in whole.state_dict().items())
    assert (folder / "processor_config.json").read_text() == '{"image_seq_length": 4}'
