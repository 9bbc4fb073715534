"""Tiny random models and a tokenizer for tests: a few thousand parameters, any of the supported architectures."""

import copy
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from lit_rlhf.engine.attention import IMPLEMENTATION
from lit_rlhf.engine.packing import Example
from lit_rlhf.models.policy import Policy

VOCABULARY = 40  # <pad> <s> </s>, then words w3 ... w39
PAD, BOS, EOS = 0, 1, 2
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    ),
    "qwen3": Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=8),
    "gpt_neox": GPTNeoXConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=5),
    "gemma2": Gemma2Config(  # scores and logits with a soft cap, a sliding window in every other layer
        **SHAPE,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=5,
        attn_logit_softcapping=1.0,
        final_logit_softcapping=3.0,
        query_pre_attn_scalar=8,
    ),
}
SINKS = GptOssConfig(  # attention sinks, which packed rows do not have
    **SHAPE,
    num_key_value_heads=2,
    head_dim=8,
    num_local_experts=2,
    num_experts_per_tok=1,
    sliding_window=64,
    rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
)
ARCHITECTURES = sorted(CONFIGS)


def tiny_model(architecture: str = "llama", seed: int = 0) -> torch.nn.Module:
    """A random causal LM of one of `CONFIGS`."""
    return spread_model(CONFIGS[architecture], IMPLEMENTATION, seed)


def spread_model(config: PreTrainedConfig, attention: str, seed: int = 0) -> torch.nn.Module:
    """A random causal LM with logits spread enough that mistakes show."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    return model.eval()


def tiny_policy(architecture: str = "llama", seed: int = 0) -> Policy:
    """A tiny model in the role of a policy."""
    return Policy(tiny_model(architecture, seed))


def tiny_tokenizer(pad_is_eos: bool = False, missing: str | None = None) -> PreTrainedTokenizerFast:
    """One token per word: the text of token i is `w<i>`; a missing word leaves its id unused."""
    vocabulary = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    vocabulary.pop(missing, None)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="</s>" if pad_is_eos else "<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=64,
    )


def save_tiny(folder: Path, architecture: str = "llama", seed: int = 0, pad_is_eos: bool = False) -> Path:
    """A Hugging Face folder with model and tokenizer."""
    tiny_model(architecture, seed).save_pretrained(folder)
    tiny_tokenizer(pad_is_eos).save_pretrained(folder)
    return folder


def save_padded(folder: Path, architecture: str = "llama", rows: int = 56, seed: int = 0) -> Path:
    """A folder whose model has more embeddings than tokens, the further ones as likely as tokens if nothing forbids it.

    The word w20 is missing from the tokenizer: its id stands for no token either.
    """
    config = copy.deepcopy(CONFIGS[architecture])
    config.vocab_size = rows
    source, model = tiny_model(architecture, seed), spread_model(config, IMPLEMENTATION, seed)
    repeated = torch.cat([torch.arange(VOCABULARY), torch.arange(rows - VOCABULARY) % (VOCABULARY - 3) + 3])
    weights = source.state_dict()
    model.load_state_dict({name: w[repeated] if name in padded_weights(model) else w for name, w in weights.items()})
    model.save_pretrained(folder)
    tiny_tokenizer(missing="w20").save_pretrained(folder)
    return folder


def padded_weights(model: torch.nn.Module) -> set[str]:
    """Names of the weights that have a row for each id."""
    rows = model.config.vocab_size
    return {name for name, weight in model.state_dict().items() if weight.shape[0] == rows}


def random_examples(count: int, responses: int = 1, seed: int = 0, longest: int = 12) -> list[Example]:
    """Prompts of 1 to `longest` tokens with responses of as many."""
    rng = np.random.default_rng(seed)

    def ids() -> np.ndarray:
        return rng.integers(3, VOCABULARY, rng.integers(1, longest + 1))

    return [Example(ids(), tuple(ids() for _ in range(responses))) for _ in range(count)]


def plain_logits(model: torch.nn.Module, ids: np.ndarray, back_to: str = IMPLEMENTATION) -> torch.Tensor:
    """(S, V) logits of one sequence by transformers' own eager attention: the independent reference."""
    model.set_attn_implementation("eager")
    try:
        return model(torch.as_tensor(ids)[None], use_cache=False).logits[0]
    finally:
        model.set_attn_implementation(back_to)


def plain_response_logprobs(
    model: torch.nn.Module, prompt_ids: np.ndarray, response_ids: np.ndarray, back_to: str = IMPLEMENTATION
) -> torch.Tensor:
    """(T,) log-probs of a response, one sequence at a time."""
    ids = np.concatenate([prompt_ids, response_ids])
    logprobs = torch.log_softmax(plain_logits(model, ids, back_to)[:-1].float(), -1)
    taken = logprobs.gather(-1, torch.as_tensor(ids[1:])[:, None])[:, 0]
    return taken[len(prompt_ids) - 1 :]
