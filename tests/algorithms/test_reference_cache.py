import json
import shutil
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lit_rlhf import UserError
from lit_rlhf.algorithms import reference_cache
from lit_rlhf.algorithms.preference import response_logprobs
from tests.stages import make_stage, make_trainer, write_inputs
from tests.tiny import save_tiny


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    write_inputs(tmp_path)
    monkeypatch.setenv("LIT_RLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def forwards(monkeypatch):
    """Counts the batches that were computed rather than found."""
    counts = []

    def counted(policy, batch, ld_alpha):
        counts.append(batch.num_sequences)
        return response_logprobs(policy, batch, ld_alpha)

    monkeypatch.setattr("lit_rlhf.algorithms.dpo.response_logprobs", counted)
    return counts


def fill(workdir, splits=("train",), sources=None, template=None, **trainer):
    """The cached log-probs of each split in a fresh run, as its first step would meet them; of a single one, these."""
    module, datamodule = make_stage("dpo", workdir, cache_reference=True)
    datamodule.sources |= sources or {}
    datamodule.tokenization = replace(datamodule.tokenization, chat_template=template)
    trainer = make_trainer(workdir / "run", **trainer)
    trainer.strategy._lightning_module = module
    trainer.datamodule = datamodule
    module.trainer = datamodule.trainer = trainer
    datamodule.setup("fit")
    module.fill_cache(*splits)
    found = [module.reference_cache[split] for split in splits]
    return found[0] if len(found) == 1 else found


def test_a_second_run_finds_the_logprobs_of_the_first(workdir, forwards):
    first = fill(workdir)
    computed = len(forwards)
    assert computed > 1
    assert torch.equal(fill(workdir), first)
    assert len(forwards) == computed
    assert first.shape == (24, 2) and (first < 0).all()


def files(workdir):
    return sorted(path.name for path in (workdir / "cache" / "reference").iterdir())


@pytest.mark.parametrize("change", ["weights", "data", "template", "order", "precision", "code", "library"])
def test_whatever_changes_the_numbers_changes_the_key(workdir, change, monkeypatch):
    fill(workdir)
    trainer, asked = {}, None
    if change == "weights":
        save_tiny(workdir / "model", seed=1)
    elif change == "data":  # one token of one answer
        lines = (workdir / "preference.jsonl").read_text().splitlines()
        row = json.loads(lines[3])
        lines[3] = json.dumps(row | {"chosen": row["chosen"] + " w5"})
        (workdir / "preference.jsonl").write_text("\n".join(lines) + "\n")
    elif change == "template":
        rows = [json.loads(line) for line in (workdir / "preference.jsonl").read_text().splitlines()]
        for row in rows:
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
            for side in ("chosen", "rejected"):
                row[side] = [{"role": "assistant", "content": row[side]}]
        (workdir / "preference.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        template = "{% for m in messages %}{{ m.content }} {% endfor %}"
        fill(workdir, template=template)
        asked = template.replace("{{ m.content }}", "{{ 'w7 ' + m.content }}")
    elif change == "order":
        lines = (workdir / "preference.jsonl").read_text().splitlines()
        (workdir / "preference.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    elif change == "code":  # of the model
        monkeypatch.setattr("inspect.getsource", lambda module: f"mended {module.__name__}")
    elif change == "library":
        monkeypatch.setattr(reference_cache, "transformers", SimpleNamespace(__version__="5.99"))
    else:
        trainer = {"precision": "bf16-mixed"}
    before = len(files(workdir))
    fill(workdir, template=asked, **trainer)
    assert len(files(workdir)) == before + 1


def test_the_weights_are_read_once_for_all_splits(workdir, monkeypatch):
    reads, real = [], reference_cache.full_state_dict
    monkeypatch.setattr(reference_cache, "full_state_dict", lambda network: reads.append(1) or real(network))
    lines = (workdir / "preference.jsonl").read_text().splitlines()
    (workdir / "held_out.jsonl").write_text("\n".join(lines[:3]) + "\n")
    sources = {"train": str(workdir / "preference.jsonl"), "validation": str(workdir / "held_out.jsonl"), "test": None}
    assert fill(workdir, ("train", "val"), sources)[1].shape == (3, 2)
    assert reads == [1]


def test_a_killed_run_is_taken_up_where_its_parts_end(workdir, forwards, monkeypatch):
    whole = fill(workdir)
    total = len(forwards)
    (final,) = (workdir / "cache" / "reference").iterdir()
    final.unlink()
    forwards.clear()

    monkeypatch.setattr(reference_cache, "SECONDS_PER_PART", 0.0)  # a part after each batch
    counted = fill.__globals__["response_logprobs"]

    def dies_after_two(policy, batch, ld_alpha):
        if len(forwards) == 2:
            raise KeyboardInterrupt
        forwards.append(1)
        return counted(policy, batch, ld_alpha)

    monkeypatch.setattr("lit_rlhf.algorithms.dpo.response_logprobs", dies_after_two)
    with pytest.raises(KeyboardInterrupt):
        fill(workdir)
    assert files(workdir) == [final.with_suffix(".parts").name]

    monkeypatch.setattr("lit_rlhf.algorithms.dpo.response_logprobs", lambda *args: forwards.append(1) or counted(*args))
    resumed = fill(workdir)
    assert len(forwards) == total  # two before the kill, the others after
    torch.testing.assert_close(resumed, whole)
    assert files(workdir) == [final.name]


def other_number(data):
    """One bit of one number is another: still a file of finite log-probs."""
    return data[:-2] + bytes([data[-2] ^ 1]) + data[-1:]


@pytest.mark.parametrize("damage", [lambda data: data[:40], lambda data: b"", other_number])
def test_a_damaged_file_is_computed_anew(workdir, forwards, damage):
    first = fill(workdir)
    (file,) = (workdir / "cache" / "reference").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    forwards.clear()
    with pytest.warns(UserWarning, match=r"safetensors: damaged \(.*\); what it held is computed anew"):
        assert torch.equal(fill(workdir), first)
    assert forwards
    forwards.clear()
    assert torch.equal(fill(workdir), first) and not forwards


@pytest.mark.parametrize("logprobs", [torch.zeros(23, 2), torch.zeros(24, 1), torch.full((24, 2), float("nan"))])
def test_log_probs_of_another_shape_or_not_finite_are_never_taken(workdir, forwards, logprobs):
    first = fill(workdir)
    (file,) = (workdir / "cache" / "reference").iterdir()
    reference_cache.write({"logprobs": logprobs}, file)
    forwards.clear()
    assert torch.equal(fill(workdir), first) and forwards


def test_log_probs_that_come_out_not_finite_are_named_and_not_kept(workdir, monkeypatch):
    def overflowing(policy, batch, ld_alpha):
        return response_logprobs(policy, batch, ld_alpha) / 0

    monkeypatch.setattr("lit_rlhf.algorithms.dpo.response_logprobs", overflowing)
    with pytest.raises(UserError, match=r"of 24 of 24 train rows are not finite \(the first is row 1\)"):
        fill(workdir)
    assert not [name for name in files(workdir) if name.endswith(".safetensors")]


def test_damaged_log_probs_of_a_checkpoint_are_refused(workdir):
    module, data, trainer = cached(workdir)
    trainer.fit(module, data)
    module.reference_cache.by_rows[data.rows_fingerprint("train")][3, 1] = float("inf")
    trainer.save_checkpoint(workdir / "end.ckpt")
    module, data, _ = cached(workdir)
    with pytest.raises(UserError, match="ckpt_path: the reference log-probs of the train rows in the checkpoint"):
        make_trainer(workdir / "run", max_epochs=2).fit(module, data, ckpt_path=workdir / "end.ckpt")


def test_a_cache_that_cannot_be_written_costs_the_next_run_time_and_this_one_nothing(workdir, forwards, monkeypatch):
    kept = fill(workdir)
    (workdir / "full").write_text("a file where the folder should be")
    monkeypatch.setenv("LIT_RLHF_CACHE", str(workdir / "full"))
    with pytest.warns(UserWarning, match="cannot be kept in .*this run goes on with them"):
        assert torch.equal(fill(workdir), kept)


def test_parts_are_found_again_by_their_rows(workdir):
    parts = reference_cache.Parts(workdir / "x.parts")
    parts.add(torch.tensor([1]), torch.tensor([[-1.0, -2.0]]))
    parts.flush()
    assert parts.load(3)[1].tolist() == [-1.0, -2.0]
    assert parts.load(3).isnan().sum() == 4


def test_runs_that_share_a_folder_clear_it_while_others_write(workdir):
    """Two writers lose parts to one that clears the folder all the time, but nobody fails."""
    folder, failures, until = workdir / "y.parts", [], time.monotonic() + 0.5

    def write():
        try:
            while time.monotonic() < until:
                parts = reference_cache.Parts(folder)
                parts.add(torch.tensor([0]), torch.zeros(1, 2))
                parts.flush()
        except Exception as error:
            failures.append(error)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        shutil.rmtree(folder, ignore_errors=True)
    assert not failures


def cached(workdir):
    module, data = make_stage("dpo", workdir, cache_reference=True)
    return module, data, make_trainer(workdir / "run", max_epochs=1, limit_val_batches=1.0)


def test_validation_and_test_after_training_are_held_against_the_reference_of_the_start(workdir):
    results = {}
    for cache_reference in (True, False):
        module, data = make_stage("dpo", workdir, cache_reference=cache_reference)
        trainer = make_trainer(workdir / "run", max_epochs=1, limit_val_batches=1.0)
        trainer.validate(module, data, verbose=False)  # before `fit`, which still finds all it needs
        trainer.fit(module, data)
        results[cache_reference] = [
            trainer.validate(module, data, verbose=False),
            trainer.test(module, data, verbose=False),  # of the validation rows, which are known
        ]
    [[cached_val], [cached_test]], [[val], [test]] = results[True], results[False]
    assert cached_val == pytest.approx(val) and cached_test == pytest.approx(test)
    assert val["val/reward_margin"] != 0


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_rows_that_the_reference_never_saw_are_refused_once_it_is_gone(workdir, split):
    module, data, trainer = cached(workdir)
    trainer.fit(module, data)
    trainer.save_checkpoint(workdir / "end.ckpt")
    lines = (workdir / "preference.jsonl").read_text().splitlines()
    (workdir / "other.jsonl").write_text("\n".join(lines[::-1]) + "\n")  # the same rows, in another order
    module, data, _ = cached(workdir)
    data.sources[split] = str(workdir / "other.jsonl")
    trainer = make_trainer(workdir / "run", max_epochs=2, limit_val_batches=1.0)
    run = {"train": trainer.fit, "validation": trainer.validate, "test": trainer.test}[split]
    with pytest.raises(UserError, match="there are no reference log-probs of these"):
        run(module, data, ckpt_path=workdir / "end.ckpt")
