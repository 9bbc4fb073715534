"""What 8, 64 and 512 GPUs would do for models of 1, 8 and 70 B: by formula, from data sheets and what is said below.

    python -m benchmarks.cluster

Nothing is measured here: a table tells where memory, network and decoding set the limits, not what a run reaches.
docs/scaling.md has it, with the formulas in words.
"""

import math
from typing import NamedTuple

from benchmarks.rounds import print_table

# One H100 SXM by its data sheet, and a node of 8 with a 400 Gb/s adapter for each.
PEAK, MEMORY, MEMORY_RATE = 989e12, 80e9, 3.35e12  # dense bfloat16, operations a second; bytes; bytes a second
NVLINK, ADAPTER, PER_NODE = 450e9, 50e9, 8  # bytes a second, in one direction
# Assumed: what of these a run reaches.
MFU, DECODING = 0.4, 0.6
MICRO_BATCH = 16_384  # tokens of a GPU at a time
STEP_TOKENS = 2**20  # of an optimiser step of SFT, all GPUs
EPISODES, PROMPT, RESPONSE = 2048, 512, 512  # of an iteration of PPO, all GPUs; tokens of each
CLUSTERS = (8, 64, 512)


class Model(NamedTuple):
    """A Llama's shape."""

    name: str
    weights: float
    width: int
    layers: int
    kv_width: int  # heads of keys x their width
    outside: float  # weights of embeddings and head, which no block holds

    @property
    def unit(self) -> float:
        """Weights that FSDP2 gathers at a time at most: a block, or all that no block holds."""
        return max(self.outside, (self.weights - self.outside) / self.layers)


MODELS = (
    Model("1 B", 1.24e9, 2048, 16, 512, 128_256 * 2048),
    Model("8 B", 8.03e9, 4096, 32, 1024, 2 * 128_256 * 4096),
    Model("70 B", 70.6e9, 8192, 80, 1024, 2 * 128_256 * 8192),
)


class Sharing(NamedTuple):
    """How GPUs share a model that learns, in bytes a weight."""

    name: str
    rest: float  # weight, moments and buckets, which stay between steps
    gradient: float
    cut: bool  # over all GPUs
    exchanged: float  # with the others, a micro-batch (FSDP2) or a step (DDP)


# float32 weights and gradients, two moments. DDP holds gradients once more in its buckets, and sums them by a ring:
# each goes out twice. FSDP2 gathers weights in bfloat16 for the forward and the backward pass, and scatters gradients.
DDP = Sharing("DDP", 12 + 4, 4, cut=False, exchanged=2 * 4)
FSDP2 = Sharing("FSDP2", 12, 4, cut=True, exchanged=2 * 2 + 4)


def sharing_for(model: Model) -> Sharing:
    """Whole copies where they leave most of a GPU to activations."""
    return DDP if (DDP.rest + DDP.gradient) * model.weights < MEMORY / 2 else FSDP2


def held(model: Model, gpus: int, bytes_per_weight: float) -> float:
    """Bytes on a GPU of what is shared as its policy is."""
    return bytes_per_weight * model.weights / (gpus if sharing_for(model).cut else 1)


def learning(model: Model, gpus: int, networks: int = 1) -> float:
    """Bytes on a GPU while networks learn, blocks being computed twice: their inputs in float32, and units at hand."""
    sharing = sharing_for(model)
    gathered = (2 * 2 + 4) * model.unit if sharing.cut else 0.0
    inputs = 4 * model.layers * model.width * min(MICRO_BATCH, STEP_TOKENS // gpus)
    return networks * (held(model, gpus, sharing.rest + sharing.gradient) + inputs) + gathered


def rollout(model: Model, gpus: int) -> float:
    """Bytes on a GPU while PPO plays: the policy whole in bfloat16, all roles at rest, keys and values."""
    sharing = sharing_for(model)
    roles = held(model, gpus, 2 * sharing.rest + 2) + 2 * model.weights  # a reward model is in pieces under none
    return 2 * model.weights + roles + keys_and_values(model) * slots(gpus) * (PROMPT + RESPONSE)


def slots(gpus: int) -> int:
    """Episodes of a GPU, all played at the same time."""
    return max(1, EPISODES // gpus)


def keys_and_values(model: Model) -> float:
    """Bytes of a token in the cache, in bfloat16."""
    return 2 * 2 * model.layers * model.kv_width


def rate(gpus: int) -> float:
    """Bytes a second of a ring over all GPUs: of NVLink, or of a node's adapters together, which it is cut over."""
    return NVLINK if gpus <= PER_NODE else min(NVLINK, PER_NODE * ADAPTER)


def exchange(size: float, gpus: int) -> float:
    """Seconds to hand bytes round."""
    return size * (gpus - 1) / gpus / rate(gpus)


def compute(operations: float) -> float:
    """Seconds on one GPU."""
    return operations / (PEAK * MFU)


def sft_step(model: Model, gpus: int) -> tuple[float, float]:
    """Seconds of products, and of the network, of an optimiser step of `STEP_TOKENS`."""
    sharing, tokens = sharing_for(model), STEP_TOKENS / gpus
    micro_batches = math.ceil(tokens / MICRO_BATCH) if sharing.cut else 1
    return compute(6 * model.weights * tokens), micro_batches * exchange(sharing.exchanged * model.weights, gpus)


def ppo_iteration(model: Model, gpus: int) -> tuple[float, float, float]:
    """Seconds of the rollout, of scoring and learning, and of the network, of an iteration of `EPISODES`."""
    sharing, episodes = sharing_for(model), slots(gpus)
    tokens = episodes * (PROMPT + RESPONSE)
    cells = episodes * (PROMPT + RESPONSE / 2)  # cached tokens, in the mean over a response
    step = (2 * model.weights + keys_and_values(model) * cells) / (MEMORY_RATE * DECODING)
    played = compute(2 * model.weights * episodes * PROMPT) + RESPONSE * step
    learnt = compute((2 * 6 + 4 * 2) * model.weights * tokens)  # policy and critic learn; four roles read
    micro_batches = math.ceil(tokens / MICRO_BATCH)
    passes = 2 * sharing.exchanged * (micro_batches if sharing.cut else 1)
    gathers = (2 + 3 * 2 * micro_batches) if sharing.cut else 0  # for the rollout; three roles once more to score
    return played, learnt, exchange((passes + gathers) * model.weights, gpus)


def gigabytes(size: float) -> str:
    """A figure of the table; one that does not fit into a GPU is told so."""
    return f"{size / 1e9:.0f}" if size < 0.95 * MEMORY else f"**{size / 1e9:.0f}**"


def main() -> None:
    """Print both tables."""
    pairs = [(model, gpus) for model in MODELS for gpus in CLUSTERS]
    rows = []
    for model, gpus in pairs:
        products, network = sft_step(model, gpus)
        memory = gigabytes(learning(model, gpus))
        rows.append(
            (
                model.name,
                gpus,
                sharing_for(model).name,
                memory,
                products,
                network,
                STEP_TOKENS / max(products, network) / 1e6,
            )
        )
    columns = ("model", "GPUs", "strategy", "GB a GPU", "products, s", "network, s", "M tokens/s at most")
    print_table(f"SFT, all weights, {STEP_TOKENS:,} tokens a step", columns, rows)
    rows = []
    for model, gpus in pairs:
        learns, plays = (
            learning(model, gpus, networks=2) + held(model, gpus, 2) + 2 * model.weights,
            rollout(model, gpus),
        )
        if max(learns, plays) > 0.95 * MEMORY:
            times: tuple[object, ...] = ("", "", "", "")
        else:
            played, learnt, network = ppo_iteration(model, gpus)
            times = (played, learnt, network, f"{played / (played + learnt + network):.0%}")
        rows.append((model.name, gpus, slots(gpus), gigabytes(plays), gigabytes(learns), *times))
    columns = ("model", "GPUs", "episodes a GPU", "GB, rollout", "GB, learning", "rollout, s", "learning, s")
    print_table(
        f"PPO, four roles, {EPISODES:,} episodes an iteration", (*columns, "network, s", "rollout's share"), rows
    )


if __name__ == "__main__":
    main()
