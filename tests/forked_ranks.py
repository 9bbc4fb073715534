"""Two ranks as torchrun would start them, forked from one process that has read the libraries; or one by itself."""

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def free_port() -> int:
    """Of this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def in_two_ranks(work: Callable[..., None], *args: Any) -> int:
    """Run it in both; 1 if one of them failed."""
    forked, port = multiprocessing.get_context("fork"), free_port()
    ranks = [forked.Process(target=one_rank, args=(rank, port, work, *args)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return int(any(process.exitcode for process in ranks))


def one_rank(rank: int, port: int, work: Callable[..., None], *args: Any) -> None:
    """With the environment that torchrun would give it."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
    os.environ.update({key: str(value) for key, value in {**ranks, **where}.items()})
    work(*args)


@contextmanager
def group_of_one(folder: Path) -> Iterator[Any]:
    """While inside, this process is a group by itself, with a mesh to shard networks over."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()
