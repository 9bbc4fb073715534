import pytest
from transformers import GenerationConfig

from lit_rlhf.data.chat import stop_token_ids
from lit_rlhf.errors import UserError
from tests.tiny_tokenizers import CHATML, byte_tokenizer


def test_stop_ids_are_the_end_token_the_end_of_turn_and_the_generation_config():
    tokenizer = byte_tokenizer(CHATML)
    eos, end_of_turn = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_token_ids(tokenizer) == (eos, end_of_turn)
    assert stop_token_ids(tokenizer, GenerationConfig(eos_token_id=[7, eos])) == (eos, end_of_turn, 7)
    assert stop_token_ids(byte_tokenizer(), GenerationConfig(eos_token_id=9)) == (eos, 9)
    bare = byte_tokenizer()
    bare.eos_token = None
    with pytest.raises(UserError, match="no response ends"):
        stop_token_ids(bare)
