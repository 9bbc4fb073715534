"""Make `lit_rlhf/demo/model`: the tokenizer trained on the embedded text, and the configuration of a 1.3 M Llama.

Run `python -m lit_rlhf.demo.build` after a change of the grammar. The folder holds no weights: the demo trains them.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from lit_rlhf.demo.text import rows

MODEL_DIR = Path(__file__).parent / "model"
MAX_LENGTH = 256

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"

# No line breaks between the turns: each would be a token.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ raise_exception('the roles are user and assistant, not ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, and every word of the embedded text is one token; any other text falls back to bytes.

    A BPE without merges, which takes a whole word where the vocabulary has it (`ignore_merges`): trained merges would
    spend 300 more tokens on the pieces that lead up to the words.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = Counter(word for text in _training_text() for word, _ in split.pre_tokenize_str(text))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    by_frequency = sorted(set(words) - set(alphabet), key=lambda word: (-words[word], word))
    vocabulary = {token: index for index, token in enumerate([PAD, USER, ASSISTANT, END, *alphabet, *by_frequency])}

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """A Llama of 1.4 M parameters.

    Few layers make a quick step. Each head has its own keys: with shared ones the model learns more slowly to copy a
    product or an order number out of the prompt.
    """
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build(folder: Path) -> None:
    """Write the tokenizer and the configurations into `folder`."""
    tokenizer = build_tokenizer()
    config = build_config(tokenizer)
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    GenerationConfig(
        do_sample=True, max_new_tokens=64, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)


def _training_text() -> Iterator[str]:
    for row in rows("sft"):
        yield row["prompt"][-1]["content"]
        yield row["completion"][-1]["content"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=MODEL_DIR, help="where to write (default: %(default)s)")
    build(parser.parse_args().folder)
