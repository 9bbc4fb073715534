import pytest
import torch
from torch import nn

from lit_rlhf.callbacks.memory import Held, MemoryTable, buffers, held_roles, size_of, state_bytes, table
from lit_rlhf.engine.sharding import shard
from lit_rlhf.models.adapters import LoRA
from tests.forked_ranks import group_of_one
from tests.stages import make_stage, make_trainer

TITLE = "from here on each rank holds:"
WORDS = {"dpo": {"reference"}, "ppo": {"reference", "critic", "reward", "slot cache"}}


def start(stage, inputs, folder, **options):
    """A run of one step, and what each of its roles held at its start."""
    module, data = make_stage(stage, inputs, **options)
    kept = {}

    class Keep(MemoryTable):
        def on_fit_start(self, trainer, pl_module):
            super().on_fit_start(trainer, pl_module)
            kept.update({row.role: row for row in held_roles(pl_module, trainer.optimizers)})

    make_trainer(folder, max_steps=1, callbacks=[Keep()]).fit(module, data)
    return module, kept


@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo", "ppo"])
def test_each_stage_tells_its_roles_in_80_columns(stage, inputs, tmp_path, caplog):
    caplog.set_level("INFO")
    start(stage, inputs, tmp_path)
    (told,) = [record.message for record in caplog.records if record.message.startswith(TITLE)]
    assert max(map(len, told.splitlines())) <= 80
    assert told.isascii()
    named = {line[:12].strip() for line in told.splitlines()}
    first = "reward_model" if stage == "reward_model" else "policy"
    assert {first, "all"} | WORDS.get(stage, set()) <= named


def test_trained_weights_are_told_as_the_run_then_holds_them(inputs, tmp_path):
    module, kept = start("sft", inputs, tmp_path)
    policy, (optimizer,) = kept["policy"], module.trainer.optimizers
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    states = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    total = 4 * sum(p.numel() for p in module.parameters())
    assert policy == Held("policy", "own model", total // 4, 0, total, total, 2 * total)
    assert 4 * sum(t.numel() for t in states) == policy.optimizer
    assert len(gradients) in (0, len(list(module.parameters())))  # Lightning frees them before the next step


def test_with_lora_the_base_is_counted_once_however_many_roles_stand_on_it(inputs, tmp_path):
    module, kept = start("ppo", inputs, tmp_path, lora=LoRA(r=2))
    base = sum(p.numel() for p in module.policy.parameters() if not p.requires_grad)
    assert kept["policy"].frozen == base
    assert (kept["reference"].weights, kept["reference"].place) == (0, "policy's base")
    assert kept["critic"].frozen == 0 < kept["critic"].trained < base
    assert kept["critic"].gradients == kept["critic"].weights == kept["critic"].optimizer // 2
    assert kept["reward"].place == "Python"


def test_where_weights_are_in_pieces_it_is_told_what_is_whole_on_each_rank(inputs, tmp_path):
    module, kept = start("ppo", inputs, tmp_path)
    with group_of_one(tmp_path) as mesh:
        shard(module.policy, mesh)
        places = {row.role: row.place for row in held_roles(module, [])}
        whole = {row.role: row for row in buffers(module.trainer, module)}
    assert (kept["reference"].place, places["reference"]) == ("own model, frozen", "whole on each rank")
    assert places["policy"] == kept["policy"].place and places["reward"] == "Python"
    assert whole["policy"] == Held("policy", "whole, in a rollout", 0, 0, kept["policy"].weights, 0, 0)


def test_a_reference_that_learns_nothing_has_neither_gradients_nor_moments(inputs, tmp_path):
    _, kept = start("dpo", inputs, tmp_path)
    reference = kept["reference"]
    assert (reference.place, reference.gradients, reference.optimizer) == ("own model, frozen", 0, 0)
    assert reference.weights == kept["policy"].weights


@pytest.mark.parametrize(
    ("options", "place"), [({"cache_reference": True}, "log-probs, cached"), ({"reference_free": True}, "none")]
)
def test_a_reference_without_a_network_takes_nothing(options, place, inputs, tmp_path):
    _, kept = start("dpo", inputs, tmp_path, **options)
    assert (kept["reference"].place, kept["reference"].weights) == (place, 0)


def test_the_state_of_an_optimiser_that_is_not_known_is_a_question_mark():
    weight = nn.Parameter(torch.zeros(3, 4))
    assert state_bytes([weight], torch.optim.AdamW([weight])) == 2 * 3 * 4 * 4
    assert state_bytes([weight], torch.optim.SGD([weight])) is None
    assert state_bytes([], torch.optim.SGD([weight])) == 0
    assert table([Held("policy", "own model", 12, 0, 48, 48, None)])[1].endswith("?")


def test_sizes_read_well():
    assert [size_of(n) for n in (0, 48_000, 1_500_000, 24 * 10**9)] == ["-", "0.0 MB", "1.5 MB", "24.00 GB"]


def test_it_can_be_left_out(inputs, tmp_path, caplog):
    caplog.set_level("INFO")
    module, data = make_stage("sft", inputs)
    make_trainer(tmp_path, max_steps=1, callbacks=[MemoryTable(show=False)]).fit(module, data)
    assert not [record for record in caplog.records if record.message.startswith(TITLE)]
