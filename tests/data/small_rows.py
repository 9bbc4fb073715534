"""Small files of rows, and data modules set up as a Trainer of several ranks would."""

import json
from types import SimpleNamespace

from lit_rlhf.data.naming import parse_sources
from lit_rlhf.data.sources import iterate_rows

WORDS = "how so very yes no it is"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(source, role="train", kind="sft"):
    """The rows of one source."""
    return list(iterate_rows(parse_sources(str(source))[0], kind, role))


def sft_file(tmp_path, n=20):
    return write(tmp_path / "sft.jsonl", [{"prompt": "how", "completion": " very" * (i % 5 + 1)} for i in range(n)])


def pair_file(tmp_path, n=20):
    rows = [{"prompt": "how so", "chosen": " yes" * (i % 5 + 1), "rejected": " no", "margin": i} for i in range(n)]
    return write(tmp_path / "pairs.jsonl", rows)


def attach(module, stage="fit", rank=0, ranks=1, **options):
    """Set up a data module as a Trainer of this many ranks would."""
    defaults = {
        "limit_train_batches": None,
        "limit_val_batches": None,
        "limit_test_batches": None,
        "gradient_clip_val": None,
        "val_check_interval": 1.0,
        "check_val_every_n_epoch": 1,
        "min_steps": None,
        "min_epochs": None,
        "log_every_n_steps": 50,
        "num_sanity_val_steps": 0,
        "loggers": [],
        "profiler": None,
        "fast_dev_run": False,
    }
    module.trainer = SimpleNamespace(
        world_size=ranks,
        strategy=SimpleNamespace(root_device="cpu", reduce=lambda value, reduce_op: value),
        distributed_sampler_kwargs={"num_replicas": ranks, "rank": rank},
        **{**defaults, "overfit_batches": 0, "callbacks": [], "accumulate_grad_batches": 1, **options},
    )
    module.setup(stage)
    return module
