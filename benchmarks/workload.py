"""The workload that every benchmark runs: a Llama with random weights, prompts and responses of uneven lengths.

Everything follows from a seed, so that each implementation does exactly the same useful work. This file needs neither
`lit_rlhf` nor Lightning: peers import it in an environment of their own.

Axes: n pairs of a prompt with a chosen and a rejected response.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PAD, BOS, EOS, FIRST_WORD = 0, 1, 2, 3
MAX_NEW_TOKENS = 256
Pair = dict[str, list[int]]  # prompt, chosen, rejected; responses end with EOS


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of a Llama."""

    hidden: int = 384
    layers: int = 8
    heads: int = 6
    kv_heads: int = 2
    intermediate: int = 1024
    vocabulary: int = 16_384
    tied: bool = True
    context: int = 4096

    def linear_parameters(self) -> int:
        """Weights that every token is multiplied with, the head left out."""
        kv = self.kv_heads * self.hidden // self.heads
        return self.layers * (2 * self.hidden**2 + 2 * self.hidden * kv + 3 * self.hidden * self.intermediate)

    def forward_flops(self, lengths: Sequence[int], head_tokens: int, shared: Sequence[int] = ()) -> float:
        """Useful operations of a forward pass over whole causal sequences.

        Args:
            lengths: of the sequences.
            head_tokens: positions at which the head is used.
            shared: lengths of beginnings that a sequence has in common with an earlier one, which need not be seen
                again.
        """
        s, p = (np.asarray(each, dtype=np.float64) for each in (lengths, shared))
        attention = self.layers * 4.0 * self.hidden * ((s * (s + 1) / 2).sum() - (p * (p + 1) / 2).sum())
        linear = 2.0 * self.linear_parameters() * (s.sum() - p.sum())
        return linear + attention + 2.0 * self.hidden * self.vocabulary * head_tokens


SHAPES = {
    "tiny": Shape(hidden=128, layers=2, heads=4, kv_heads=2, intermediate=344, vocabulary=1024),  # smoke tests
    "small": Shape(),  # 18.9 M parameters, a third of the operations in the head
    "v32k": Shape(vocabulary=32_768),
    "deep": Shape(hidden=512, layers=8, heads=8, kv_heads=2, intermediate=1408, vocabulary=8192),
    "1b": Shape(hidden=2048, layers=16, heads=32, kv_heads=8, intermediate=8192, vocabulary=128_256),
}


def make_pairs(count: int, shape: Shape, seed: int = 0) -> list[Pair]:
    """Prompts of about 90 tokens (32 to 256), responses of about 80 with a heavy tail (16 to 256), random words."""
    rng = np.random.default_rng(seed)
    prompts, chosen, rejected = (_lengths(rng, count, *law) for law in ((90, 0.6, 32), (80, 0.9, 16), (80, 0.9, 16)))

    def words(n: int) -> list[int]:
        return rng.integers(FIRST_WORD, shape.vocabulary, n).tolist()

    return [
        {"prompt": [BOS, *words(p - 1)], "chosen": [*words(c - 1), EOS], "rejected": [*words(r - 1), EOS]}
        for p, c, r in zip(prompts, chosen, rejected, strict=True)
    ]


def response_lengths(count: int, seed: int = 0) -> np.ndarray:
    """(count,) lengths that generation is made to follow: half below 64, a tail up to 256."""
    return _lengths(np.random.default_rng(seed + 77), count, 64, 0.9, 8)


def _lengths(rng: np.random.Generator, count: int, median: int, sigma: float, least: int) -> np.ndarray:
    draws = np.exp(rng.normal(np.log(median), sigma, count))
    return np.clip(draws.round().astype(int), least, MAX_NEW_TOKENS)


def sequences(task: str, pairs: Sequence[Pair]) -> tuple[list[int], int]:
    """Lengths of the sequences that a task trains on, and how many response tokens they hold."""
    sides = ("chosen",) if task == "sft" else ("chosen", "rejected")
    lengths = [len(pair["prompt"]) + len(pair[side]) for side in sides for pair in pairs]
    return lengths, sum(len(pair[side]) for side in sides for pair in pairs)


def training_flops(task: str, shape: Shape, pairs: Sequence[Pair]) -> float:
    """Useful operations of an epoch: three forward passes, and one of the reference in DPO without a cache.

    The prompt of a pair counts once, as it does in `perf/mfu`.
    """
    lengths, responses = sequences(task, pairs)
    shared = [] if task == "sft" else [len(pair["prompt"]) for pair in pairs]
    forward = shape.forward_flops(lengths, 0 if task == "reward" else responses, shared)
    return (4 if task == "dpo" else 3) * forward


def make_model(shape: Shape, classifier: bool = False, seed: int = 0, **kwargs: Any) -> Any:
    """A Hugging Face Llama with random weights, as a causal LM or a classifier with one label."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        **({"num_labels": 1} if classifier else {}),
    )
    torch.manual_seed(seed)
    return (LlamaForSequenceClassification if classifier else LlamaForCausalLM)._from_config(config, **kwargs)


def make_tokenizer(shape: Shape) -> Any:
    """One token per word: the text of token i is `t<i>`, so any list of tokens survives the way through text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, **{f"t{i}": i for i in range(FIRST_WORD, shape.vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=shape.context,
    )


def as_text(ids: Sequence[int]) -> str:
    """The text that the tokenizer turns into exactly these tokens."""
    special = {PAD: "<pad>", BOS: "<s>", EOS: "</s>"}
    return "".join(" " + special.get(i, f"t{i}") for i in ids)


def save_model(folder: Path, shape: Shape, classifier: bool = False) -> Path:
    """A Hugging Face folder with random weights and the tokenizer."""
    make_model(shape, classifier).save_pretrained(folder)
    make_tokenizer(shape).save_pretrained(folder)
    return folder
