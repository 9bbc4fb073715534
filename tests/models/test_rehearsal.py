import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lit_rlhf.engine.memory import LiveMemory, bytes_of, counting, shapes
from lit_rlhf.engine.packing import pack
from lit_rlhf.models.adapters import LoRA
from lit_rlhf.models.holding import num_weights
from lit_rlhf.models.loading import load_policy
from lit_rlhf.models.rehearsal import PackedLinear
from tests.tiny import SHAPE, random_examples, tiny_tokenizer


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path_factory):
    """A folder of a model with 2 layers of width 64, with a head of its own or not."""
    folder = tmp_path_factory.mktemp("base")
    shape = SHAPE | {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": request.param}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("frozen_dtype", [None, "bfloat16"])
def test_a_model_on_shapes_takes_what_its_weights_take(base, frozen_dtype):
    options = {"lora": LoRA(r=2), "frozen_dtype": frozen_dtype}
    with shapes():
        planned = load_policy(base, **options)
    assert bytes_of(planned.parameters()) == bytes_of(load_policy(base, **options).parameters())
    assert {name for name, _ in planned.named_buffers()} == {name for name, _ in load_policy(base).named_buffers()}


def test_in_nf4_linear_layers_but_the_head_take_half_a_byte_a_weight_and_their_scales(base):
    with shapes():
        policy = load_policy(base, lora=LoRA(r=2), frozen_dtype="nf4")
    model = policy.model
    held = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    # q, k, v and o of 64 x 64: 2048 bytes, 64 scales of a byte, one of these of 4; gate, up and down of 64 x 128.
    square, wide = 2048 + 64 + 4, 4096 + 128 + 4
    assert sum(p.numel() for p in held.values() if p.dtype == torch.uint8) == 2 * (4 * square + 3 * wide)
    embeddings = 1 if model.config.tie_word_embeddings else 2
    assert sum(p.numel() for p in held.values() if p.dtype == torch.bfloat16) == embeddings * 40 * 64 + 5 * 64
    assert sum(map(num_weights, held.values())) == embeddings * 40 * 64 + 5 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert type(model.get_output_embeddings()) is nn.Linear


def test_a_base_in_nf4_carries_gradients_and_keeps_no_unpacked_weight():
    memory = LiveMemory()
    with shapes(), memory:
        layer = PackedLinear(nn.Linear(64, 1024, bias=False))
        x = torch.ones(2, 64, requires_grad=True)
        unpacked, before = 2 * 64 * 1024, memory.now
        y = layer(x)
        assert memory.peaks[""] > before + unpacked > memory.now
        y.sum().backward()
        assert x.grad.shape == (2, 64) and layer.weight.grad is None
        assert memory.now < before + unpacked


def test_packed_rows_run_on_a_base_in_nf4(base):
    with shapes():
        policy = load_policy(base, lora=LoRA(r=2), frozen_dtype="nf4")
    with counting(LiveMemory()):
        logprobs, _ = policy(pack(random_examples(3)))
        logprobs.sum().backward()
    assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)
