"""Contestant: LitGPT's or torchtune's model and loss on the same workload, run by a Python in which one of them is.

Batches are padded to their longest sequence and only responses are learnt, as in the recipes of both; around them a
plain loop with torch's fused AdamW. In bfloat16 all weights are, as both have it by default.
"""

import argparse
import os
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks import workload
from benchmarks.rounds import clock, serve

Loss = Callable[[Tensor, Tensor], Tensor]


def litgpt(shape: workload.Shape) -> tuple[torch.nn.Module, Loss]:
    """As `litgpt.finetune.full` computes them: the head in chunks of 128 positions."""
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    config = Config(
        block_size=shape.context,
        vocab_size=shape.vocabulary,
        padded_vocab_size=shape.vocabulary,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_query_groups=shape.kv_heads,
        n_embd=shape.hidden,
        intermediate_size=shape.intermediate,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        parallel_residual=False,
        rotary_percentage=1.0,
        bias=False,
    )
    model = GPT(config)
    if shape.tied:
        model.lm_head.weight = model.transformer.wte.weight

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        logits = model(ids, lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        mean: Tensor = chunked_cross_entropy(logits, labels[..., 1:])
        return mean

    return model, loss


def torchtune(shape: workload.Shape) -> tuple[torch.nn.Module, Loss]:
    """As `full_finetune_single_device` computes them: the head in eight chunks."""
    from torchtune.models.llama3_2._component_builders import llama3_2
    from torchtune.modules.loss import CEWithChunkedOutputLoss

    model = llama3_2(
        vocab_size=shape.vocabulary,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        embed_dim=shape.hidden,
        max_seq_len=shape.context,
        intermediate_dim=shape.intermediate,
        tie_word_embeddings=shape.tied,
    )
    of_chunks = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(of_chunks.num_output_chunks)

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        shifted = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=-100)
        mean: Tensor = of_chunks(model(ids), shifted)
        return mean

    return model, loss


def batches(pairs: list[workload.Pair], size: int) -> list[tuple[Tensor, Tensor]]:
    """(B, T) token ids and labels, in the order of the data."""
    found = []
    for first in range(0, len(pairs), size):
        rows = pairs[first : first + size]
        longest = max(len(row["prompt"]) + len(row["chosen"]) for row in rows)
        ids = torch.full((len(rows), longest), workload.PAD)
        labels = torch.full((len(rows), longest), -100)
        for number, row in enumerate(rows):
            both = torch.tensor(row["prompt"] + row["chosen"])
            ids[number, : len(both)] = both
            labels[number, len(row["prompt"]) : len(both)] = both[len(row["prompt"]) :]
        found.append((ids, labels))
    return found


def main() -> None:
    """Prepare, then serve rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", required=True, choices=["sft"])
    parser.add_argument("--shape", default="small", choices=sorted(workload.SHAPES))
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--slots", type=int, help="of generation, which is none of this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()

    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ.get("BENCHMARK_THREADS", "1")))
    shape = workload.SHAPES[options.shape]
    torch.manual_seed(options.seed)
    torch.set_default_dtype(torch.bfloat16 if options.bf16 else torch.float32)
    model, loss_of = (litgpt if find_spec("litgpt") else torchtune)(shape)
    for matrix in (p for p in model.parameters() if p.ndim > 1):
        torch.nn.init.normal_(matrix, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    rows = batches(workload.make_pairs(options.pairs, shape, options.seed), options.batch)

    def train(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        start = clock()
        for ids, labels in rows:
            loss = loss_of(ids, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {"seconds": clock() - start, "loss": float(loss.detach())}

    train(rows[:1])
    serve(lambda: train(rows))


if __name__ == "__main__":
    main()
