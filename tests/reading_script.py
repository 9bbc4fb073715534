"""Run by `test_cut_reading.py`: networks read whole, and cut over two ranks as they are read; writes what came out."""

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import seed_everything
from torch.distributed.device_mesh import init_device_mesh

from lit_rlhf import LoRA
from lit_rlhf.engine.sharding import shard
from lit_rlhf.models.holding import reading_in
from lit_rlhf.models.loading import load_policy, load_scorer, scorer_from_policy
from lit_rlhf.models.network import Network
from lit_rlhf.models.policy import frozen_copy
from tests.forked_ranks import in_two_ranks

ADAPTED: dict[str, Any] = {"lora": LoRA(r=2, target_modules="all-linear")}
CASES: dict[str, Callable[[Path], list[Network]]] = {  # what is read from a folder with `model` and `adapter` in it
    "policy": lambda folder: [load_policy(folder / "model")],
    "policy, copy and critic": lambda folder: with_copy_and_critic(load_policy(folder / "model")),
    "copy in bfloat16": lambda folder: with_copy(load_policy(folder / "model"), torch.bfloat16),
    "adapter": lambda folder: [load_policy(folder / "model", **ADAPTED)],
    "adapter on bfloat16": lambda folder: [load_policy(folder / "model", **ADAPTED, frozen_dtype="bfloat16")],
    "dora": lambda folder: [load_policy(folder / "model", lora=LoRA(r=2, use_dora=True))],
    "from an adapter": lambda folder: [load_policy(folder / "adapter")],
    "merged": lambda folder: [load_policy(folder / "adapter", merge_start=True)],
    "reward model": lambda folder: [load_scorer(folder / "model", fresh_head=True)],
    "reward model, adapter": lambda folder: [load_scorer(folder / "model", fresh_head=True, **ADAPTED)],
}


def with_copy(policy: Any, dtype: torch.dtype | None = None) -> list[Network]:
    """A policy and its reference."""
    return [policy, frozen_copy(policy, dtype)]


def with_copy_and_critic(policy: Any) -> list[Network]:
    """And a critic on a copy of its trunk, whose head is drawn after weights that are not drawn where it is cut."""
    networks = [*with_copy(policy), scorer_from_policy(policy)]
    torch.nn.init.ones_(networks[-1].model.score.weight)  # type: ignore[union-attr, operator]
    return networks


def anonymous_mb() -> float:
    """Memory of this process that is no file's."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024


class Peak:
    """The most of it while inside, beyond what there was before."""

    def __enter__(self) -> "Peak":
        self.before = self.most = anonymous_mb()
        self.over = False
        self.watch = threading.Thread(target=self.look)
        self.watch.start()
        return self

    def look(self) -> None:
        """Look again and again."""
        while not self.over:
            self.most = max(self.most, anonymous_mb())
            time.sleep(0.001)

    def __exit__(self, *error: object) -> None:
        self.over = True
        self.watch.join()
        self.megabytes = max(self.most, anonymous_mb()) - self.before


def differing(folder: Path, case: str, mesh: Any) -> list[str]:
    """Weights that are not the same, in number, dtype or whether they learn, when they are cut as they are read."""
    wholes, cuts = [], []
    for uncut, networks in ((False, wholes), (True, cuts)):
        seed_everything(0, verbose=False)
        with reading_in(torch.float32, uncut=uncut):
            networks += CASES[case](folder)
    found = []
    for number, (whole, cut) in enumerate(zip(wholes, cuts, strict=True)):
        shard(cut, mesh)
        cut.settle()
        for (name, theirs), ours in zip(whole.named_parameters(), cut.parameters(), strict=True):
            if "lora_A" in name and not ours.full_tensor().equal(theirs):  # type: ignore[operator]
                theirs = torch.nn.Parameter(theirs.bfloat16().float())  # PEFT draws one in the dtype of its base
            same = ours.dtype == theirs.dtype and ours.requires_grad == theirs.requires_grad
            if not same or not torch.equal(ours.full_tensor(), theirs):  # type: ignore[operator]
                found.append(f"{number}: {name}")
    return found


def main(folder: Path) -> None:
    """Each case; then the memory of a larger model."""
    mesh = init_device_mesh("cpu", (2,))
    results: dict[str, Any] = {case: differing(folder, case, mesh) for case in CASES}
    with Peak() as peak, reading_in(torch.float32, uncut=True):
        networks = with_copy_and_critic(load_policy(folder / "large"))
        for network in networks:
            shard(network, mesh)
            network.settle()
    results["megabytes"] = peak.megabytes
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))


def in_a_group(folder: Path) -> None:
    """With no Trainer that would make one."""
    dist.init_process_group("gloo")
    main(folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(in_two_ranks(in_a_group, Path(sys.argv[1])))
