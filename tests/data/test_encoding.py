import inspect
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from lit_rlhf.data.reader import Options
from lit_rlhf.data.tokenize import tokenize_preference, tokenize_prompts, tokenize_scored, tokenize_sft
from tests.chat_templates import LLAMA3, QWEN25
from tests.tiny_tokenizers import CHATML, byte_tokenizer, word_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
FREE = Options(max_length=None)
EOS, BOS = 1, 2
TOKENIZERS = ["byte", "tokenizers/gpt2", "tokenizers/tinyllama", "models/stories260K"]


def tokenizer_of(name, template=CHATML):
    if name == "byte":
        return byte_tokenizer(template)
    if not SHARED.exists():
        pytest.skip("no ../shared/data folder with real tokenizers")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / name)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def test_a_text_that_begins_with_the_beginning_token_gets_no_second_one():
    tokenizer = word_tokenizer("a b c", bos=True)  # a 4, " a" 5, b 6, " b" 7
    [ids] = tokenize_sft([{"text": "<bos>a b"}], tokenizer, FREE)["input_ids"]
    assert ids.tolist() == [BOS, 4, 7, EOS]
    [ids], [mask], *_ = tokenize_sft([{"prompt": "<bos>a", "completion": " b"}], tokenizer, FREE).values()
    assert (ids.tolist(), mask.tolist()) == ([BOS, 4, 7, EOS], [False, False, True, True])
    [ids] = tokenize_prompts([{"prompt": "<bos>a b"}], tokenizer, FREE)["prompt_ids"]
    assert ids.tolist() == [BOS, 4, 7]
    row = {"prompt": "<bos>a", "chosen": " b", "rejected": " c", "margin": 0.0}
    columns = tokenize_preference([row, {**row, "prompt": "a"}], tokenizer, FREE)
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert columns[name][0].tolist() == columns[name][1].tolist()
    whole = {"chosen": "<bos>a b", "rejected": "<bos>a c", "margin": 0.0}
    assert tokenize_preference([whole], tokenizer, FREE)["prompt_ids"][0].tolist() == [BOS, 4]
    scored = tokenize_scored([{"prompt": "<bos>a", "completion": " b"}], tokenizer, FREE)
    assert (scored["prompt_ids"][0].tolist(), scored["response_ids"][0].tolist()) == ([BOS, 4], [7, EOS])


def test_a_beginning_token_of_the_template_stands_once_and_one_inside_a_text_stays():
    tokenizer = byte_tokenizer(LLAMA3)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    [ids] = tokenize_prompts([{"prompt": [{"role": "user", "content": "q<bos>"}]}], tokenizer, FREE)["prompt_ids"]
    assert ids.tolist().count(tokenizer.bos_token_id) == 2 and ids[0] == tokenizer.bos_token_id
    [ids] = tokenize_prompts([{"prompt": "a<bos>"}], tokenizer, FREE)["prompt_ids"]
    assert ids.tolist().count(tokenizer.bos_token_id) == 2


def test_where_the_beginning_token_ends_texts_too_an_empty_answer_still_ends():
    tokenizer = word_tokenizer("a b")
    tokenizer.bos_token = "<eos>"
    [ids], [mask], *_ = tokenize_sft([{"prompt": "<eos>", "completion": "<eos>"}], tokenizer, FREE).values()
    assert ids.tolist() == [EOS, EOS] and mask.tolist() == [False, True]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", [CHATML, QWEN25], ids=["chatml", "qwen"])
def test_escaped_conversations_are_the_tokens_that_transformers_makes_of_them(name, template):
    tokenizer = tokenizer_of(name, template)
    if "sanitize_control_tokens" not in inspect.signature(tokenizer.apply_chat_template).parameters:
        pytest.skip("this transformers does not escape control tokens")
    texts = ["<|im_end|>", "a <|im_end|>b <|im_start|> c", "\n<|im_start|><|im_end|>\n", "é<|im_end|>🙂", " x", "</s>y"]
    for text in texts:
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": f"so {text}"}]
        messages.append({"role": "user", "content": "more"})
        wanted = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, sanitize_control_tokens=True, return_dict=False
        )
        options = Options(None, control_tokens="escape")
        [ids] = tokenize_prompts([{"prompt": messages}], tokenizer, options)["prompt_ids"]
        assert ids.tolist() == wanted, text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_masks_of_escaped_rows_hold_the_answer(name):
    tokenizer = tokenizer_of(name)
    for text in ("<|im_end|>", "a <|im_end|>b <|im_start|> c", "x"):
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": f"so {text} yes"}]
        columns = tokenize_sft([{"messages": messages}], tokenizer, Options(None, control_tokens="escape"))
        ids, mask = columns["input_ids"][0], columns["loss_mask"][0]
        assert tokenizer.decode(ids[mask]).strip() == f"so {text} yes<|im_end|>"
