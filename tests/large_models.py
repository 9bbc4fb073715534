"""The models and datasets of `configs/large/`, as far as tests need them: shapes, tokenizers, rows of each kind."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from lit_rlhf import LoRA
from lit_rlhf.models.adapter_exports import write_adapter
from lit_rlhf.models.adapter_folders import plain_config
from tests.chat_templates import QWEN3
from tests.tiny_tokenizers import byte_tokenizer

# As the config.json of each on the hub has them.
QWEN3_SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "num_key_value_heads": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000},
    "vocab_size": 151_936,
}
LLAMA3_SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "max_position_embeddings": 131_072,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000},
    "vocab_size": 128_256,
}
SHAPES = {
    "qwen3_0.6b": QWEN3_SHAPE
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "tie_word_embeddings": True,
    },
    "llama3.2_1b": LLAMA3_SHAPE
    | {
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "tie_word_embeddings": True,
    },
    "qwen3_8b_lora": QWEN3_SHAPE
    | {
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "tie_word_embeddings": False,
    },
    "llama3.1_8b": LLAMA3_SHAPE
    | {
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "tie_word_embeddings": False,
    },
}
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
DATASETS = (
    "allenai/tulu-3-sft-mixture",
    "trl-lib/Capybara",
    "trl-lib/tldr",
    "trl-lib/tldr-preference",
    "trl-lib/ultrafeedback-prompt",
    "trl-lib/ultrafeedback_binarized",
)


def tokenizer_of(chain: str) -> PreTrainedTokenizerFast:
    """One id per byte, with the special tokens and the template that the model's own has."""
    tokenizer = byte_tokenizer(QWEN3 if "qwen3" in chain else None)  # the base models of Llama have none
    if "llama" in chain:  # no pad token, and a beginning
        tokenizer.pad_token = None
        tokenizer.add_special_tokens({"bos_token": "<bos>"})
    return tokenizer


def save_tiny_of(chain: str, folder: Path) -> None:
    """A model that is small, and elsewise as the real one."""
    tokenizer = tokenizer_of(chain)
    kinds = (Qwen3Config, Qwen3ForCausalLM) if "qwen3" in chain else (LlamaConfig, LlamaForCausalLM)
    config = kinds[0](**{**SHAPES[chain], **TINY, "num_key_value_heads": 2, "vocab_size": len(tokenizer)})
    kinds[1](config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_shape_of(chain: str, folder: Path, **other: Any) -> None:
    """What a plan needs of the real model: its config.json, but for what is `other` here, and a tokenizer."""
    tokenizer_of(chain).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(SHAPES[chain] | other))


def save_scoring_adapter(base: Path, folder: Path, r: int = 2) -> None:
    """A reward model's adapter on the MLPs of a folder of `save_shape_of`, as a run exports it."""
    shape = json.loads((base / "config.json").read_text())
    wide, narrow = shape["intermediate_size"], shape["hidden_size"]
    weights = {"score.weight": torch.zeros(1, narrow)}
    for layer in range(shape["num_hidden_layers"]):
        name = f"model.layers.{layer}.mlp.down_proj"
        weights |= {f"{name}.lora_A.weight": torch.zeros(r, wide), f"{name}.lora_B.weight": torch.zeros(narrow, r)}
    folder.mkdir(parents=True)
    settings = LoRA(r=r, target_modules=["down_proj"]).config(str(base), "SEQ_CLS")
    write_adapter(folder, plain_config(settings), weights, scores={})


def write_rows(folder: Path, count: int, longest: int) -> None:
    """A file for each dataset, with columns as it has them.

    Args:
        folder: for the files.
        count: rows of each.
        longest: bytes, about, of the longest text.
    """

    def text(number: int) -> str:
        return f"{number} " + "word " * (number * longest // (5 * count))

    def chat(number: int, *roles: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text(number + turn)} for turn, role in enumerate(roles)]

    def rows_of(name: str, n: int) -> dict[str, Any]:
        if name == "trl-lib/Capybara":
            return {"source": "a", "messages": chat(n, "user", "assistant", "user", "assistant")}
        if name == "allenai/tulu-3-sft-mixture":
            return {"id": str(n), "messages": chat(n, "system", "user", "assistant")}
        if name == "trl-lib/ultrafeedback_binarized":
            question, *_ = chat(n, "user")
            answers = ([question, {"role": "assistant", "content": text(m)}] for m in (n, n + 1))
            return dict(zip(("chosen", "rejected"), answers, strict=True)) | {
                "score_chosen": 8.0,
                "score_rejected": 7.0,
            }
        if name == "trl-lib/ultrafeedback-prompt":
            return {"prompt": chat(n, "user")}
        post = f"POST: {text(n)[:900]}\n\nTL;DR:"
        return {"prompt": post} | (
            {"completion": f" {n}"} if name == "trl-lib/tldr" else {"chosen": f" {n}", "rejected": " no"}
        )

    for name in DATASETS:
        rows = (json.dumps(rows_of(name, number)) + "\n" for number in range(count))
        file_of(name, folder).write_text("".join(rows))


def file_of(dataset: str, folder: Path) -> Path:
    """Where `write_rows` puts the rows of a dataset."""
    return folder / f"{dataset.replace('/', '_')}.jsonl"
