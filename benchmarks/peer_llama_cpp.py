"""Contestant: llama.cpp on the same workload, run by a Python in which `llama-cpp-python` and `gguf` are installed.

Weights are random, of the same shape. Slots are refilled as soon as they end, with the new prompts in the batch of the
decode step. A sampler of llama.cpp draws each token from the whole distribution.
"""

import argparse
import ctypes
import os
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

from benchmarks import workload
from benchmarks.rounds import clock, serve

MOST_TOKENS = 4096  # of a batch


def write_model(path: Path, shape: workload.Shape, bf16: bool) -> None:
    """A Llama in GGUF; matrices in bfloat16 or float32, vectors in float32."""
    writer, rng = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    kind = gguf.GGMLQuantizationType.BF16 if bf16 else gguf.GGMLQuantizationType.F32

    def add(name: str, *size: int) -> None:
        weights = np.ones(size, np.float32) if len(size) == 1 else rng.normal(0, 0.02, size).astype(np.float32)
        as_kind = kind if len(size) > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(weights, as_kind), raw_dtype=as_kind)

    kv = shape.kv_heads * shape.hidden // shape.heads
    add("token_embd.weight", shape.vocabulary, shape.hidden)
    add("output_norm.weight", shape.hidden)
    if not shape.tied:
        add("output.weight", shape.vocabulary, shape.hidden)
    for layer in range(shape.layers):
        for part, size in {
            "attn_norm": (shape.hidden,),
            "ffn_norm": (shape.hidden,),
            "attn_q": (shape.hidden, shape.hidden),
            "attn_k": (kv, shape.hidden),
            "attn_v": (kv, shape.hidden),
            "attn_output": (shape.hidden, shape.hidden),
            "ffn_gate": (shape.intermediate, shape.hidden),
            "ffn_up": (shape.intermediate, shape.hidden),
            "ffn_down": (shape.hidden, shape.intermediate),
        }.items():
            add(f"blk.{layer}.{part}.weight", *size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Slots:
    """Completions written at the same time, one sequence of the cache each."""

    def __init__(self, path: Path, count: int, bf16: bool) -> None:
        silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
        self.kept = silent  # as long as it may be called
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = self.count = count
        params.n_ctx = count * 2 * workload.MAX_NEW_TOKENS
        params.n_batch = params.n_ubatch = MOST_TOKENS
        params.n_threads = params.n_threads_batch = int(os.environ.get("BENCHMARK_THREADS", "1"))
        if not bf16:
            params.type_k = params.type_v = int(gguf.GGMLQuantizationType.F32)
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.batch = llama_cpp.llama_batch_init(MOST_TOKENS, 0, 1)
        self.sampler = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        llama_cpp.llama_sampler_chain_add(self.sampler, llama_cpp.llama_sampler_init_dist(0))

    def put(self, token: int, position: int, slot: int, last: bool) -> None:
        """One more token into the batch."""
        at = self.batch.n_tokens
        self.batch.token[at], self.batch.pos[at] = token, position
        self.batch.n_seq_id[at], self.batch.seq_id[at][0], self.batch.logits[at] = 1, slot, last
        self.batch.n_tokens = at + 1

    def write(self, prompts: list[list[int]], lengths: np.ndarray) -> int:
        """Complete each prompt to its length; returns the number of tokens."""
        memory, waiting = llama_cpp.llama_get_memory(self.context), list(range(len(prompts)))[::-1]
        running: dict[int, list[int]] = {}  # by slot: prompt, tokens so far, the last one
        written = 0
        while waiting or running:
            self.batch.n_tokens = 0
            asked = {}
            for slot, (index, new, token) in running.items():
                asked[slot] = self.batch.n_tokens
                self.put(token, len(prompts[index]) + new - 1, slot, True)
            for slot in range(self.count):
                room = waiting and self.batch.n_tokens + len(prompts[waiting[-1]]) <= MOST_TOKENS
                if slot not in running and room:
                    index = waiting.pop()
                    running[slot] = [index, 0, 0]
                    for position, token in enumerate(prompts[index]):
                        self.put(token, position, slot, position == len(prompts[index]) - 1)
                    asked[slot] = self.batch.n_tokens - 1
            if failed := llama_cpp.llama_decode(self.context, self.batch):
                raise RuntimeError(f"llama_decode says {failed}")
            for slot, at in asked.items():
                state = running[slot]
                state[2] = llama_cpp.llama_sampler_sample(self.sampler, self.context, at)
                state[1] += 1
                written += 1
                if state[1] == lengths[state[0]]:
                    del running[slot]
                    llama_cpp.llama_memory_seq_rm(memory, slot, -1, -1)
        return written


def main() -> None:
    """Prepare, then serve rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", required=True, choices=["generate"])
    parser.add_argument("--shape", default="small", choices=sorted(workload.SHAPES))
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--batch", type=int, help="of training, which is none of this")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--fixed", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()

    shape = workload.SHAPES[options.shape]
    prompts = [pair["prompt"] for pair in workload.make_pairs(options.pairs, shape, options.seed)]
    lengths = workload.response_lengths(options.pairs, options.seed)
    if options.fixed is not None:
        lengths[:] = options.fixed
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_model(path, shape, options.bf16)
        slots = Slots(path, options.slots, options.bf16)

        def generate() -> dict[str, Any]:
            start = clock()
            written = slots.write(prompts, lengths)
            return {"seconds": clock() - start, "tokens": written}

        slots.write(prompts[: options.slots], np.full(options.slots, 4))
        serve(generate)


if __name__ == "__main__":
    main()
