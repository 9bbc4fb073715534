import itertools
import json
import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from transformers import AutoTokenizer

from lit_rlhf import RolloutDataModule
from lit_rlhf.data import examples
from lit_rlhf.data.batches import PreferenceBatch, PromptBatch, SFTBatch
from lit_rlhf.data.modules import PreferenceDataModule, SFTDataModule, load_prompts
from lit_rlhf.errors import UserError
from lit_rlhf.rollout import data_module as rollouts
from tests.stages import make_stage, make_trainer, write_inputs
from tests.tiny_tokenizers import CHATML, byte_tokenizer, word_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
WORDS = "how so very yes no it is"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


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
    }
    module.trainer = SimpleNamespace(
        distributed_sampler_kwargs={"num_replicas": ranks, "rank": rank},
        **{**defaults, "overfit_batches": 0, "callbacks": [], "accumulate_grad_batches": 1, **options},
    )
    module.setup(stage)
    return module


def test_demonstrations_become_packed_batches_with_masked_targets(tmp_path):
    source = write(tmp_path / "rows.jsonl", [{"prompt": "how so", "completion": " yes"}, {"text": "it is"}])
    module = SFTDataModule(source, None, batch_size=2, shuffle=False, tokenizer=word_tokenizer(WORDS))
    [batch] = attach(module).train_dataloader()
    assert isinstance(batch, SFTBatch)
    # nodes: how " so" " yes" <eos> | it " is" <eos>; learnt: " yes" <eos> | " is" <eos>
    tokens = module.tokenizer.convert_ids_to_tokens
    assert tokens(batch.packed.input_ids.tolist()) == ["how", " so", " yes", "<eos>", "it", " is", "<eos>"]
    assert tokens(batch.packed.target_ids.tolist()) == [" yes", "<eos>", " is", "<eos>"]
    assert batch.packed.predictors.tolist() == [1, 2, 4, 5]
    assert batch.packed.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.denominator.item() == 4


def test_pairs_become_packed_batches_that_store_the_prompt_once(tmp_path):
    module = PreferenceDataModule(pair_file(tmp_path), None, batch_size=20, tokenizer=word_tokenizer(WORDS))
    [batch] = attach(module).train_dataloader()
    assert isinstance(batch, PreferenceBatch)
    assert batch.packed.num_sequences == 40
    assert batch.margin.tolist() == batch.row_ids.tolist(), "row i has margin i"
    assert batch.denominator.item() == 20
    # prompt 2, chosen 1 to 5 and the end token, rejected 1 and the end token
    assert len(batch.packed.input_ids) == 20 * (2 + 3 + 1 + 2)


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_two_ranks_validate_each_row_once_in_as_many_batches(tmp_path, kind):
    make, source = (SFTDataModule, sft_file) if kind == "sft" else (PreferenceDataModule, pair_file)
    loaders = []
    for rank in range(2):
        module = make(source(tmp_path), source(tmp_path, 21), max_tokens=40, tokenizer=word_tokenizer(WORDS))
        loaders.append(attach(module, rank=rank, ranks=2).val_dataloader())
        assert len(module.rows_dataloader("val")) == len(loaders[-1]) and module.rows_dataloader("test") is None
    assert len(loaders[0]) == len(loaders[1]) > 1
    rows = [row for loader in loaders for batch in loader.sampler for row in batch.indices]
    assert sorted(rows) == list(range(module.num_rows("val"))) == list(range(21))


def test_the_defaults_are_the_demo_for_both_kinds():
    tokenizer = AutoTokenizer.from_pretrained(Path(examples.__file__).parents[1] / "demo" / "model")
    for make, batch_type in ((SFTDataModule, SFTBatch), (PreferenceDataModule, PreferenceBatch)):
        module = attach(make(tokenizer=tokenizer))
        assert isinstance(next(iter(module.train_dataloader())), batch_type)
        assert module.num_rows("train") > module.num_rows("val") > 100
        prompts = module.sample_prompts(3)
        assert len(prompts.prompt_ids) == 3 and len(prompts.columns["completion"]) == 3
        assert sum(report.kept for report in module.datasets["train"].reports) == module.num_rows("train")


def test_tokens_come_from_the_cache_until_file_tokenizer_or_options_change(tmp_path, monkeypatch):
    calls = []
    tokenize_sft = examples.tokenize.tokenize_sft
    monkeypatch.setitem(examples.FUNCTIONS, "sft", lambda *a, **k: calls.append(1) or tokenize_sft(*a, **k))
    source, tokenizer = sft_file(tmp_path), word_tokenizer(WORDS)

    def tokenized_anew(tokenizer=tokenizer, **options):
        calls.clear()
        attach(SFTDataModule(source, None, tokenizer=tokenizer, **options))
        return bool(calls)

    assert tokenized_anew()
    tokenizer("a call leaves state behind", truncation=True, max_length=3)
    assert not tokenized_anew()
    assert tokenized_anew(max_length=5)
    assert tokenized_anew(loss_on="all")
    assert tokenized_anew(tokenizer=word_tokenizer(WORDS + " new"))
    assert tokenized_anew(chat_template=CHATML)
    write(tmp_path / "sft.jsonl", [{"prompt": "so", "completion": " yes"}])
    assert tokenized_anew()


def test_several_processes_tokenise_to_the_same_rows(tmp_path, monkeypatch):
    source = sft_file(tmp_path)
    one = attach(SFTDataModule(source, None, tokenizer=word_tokenizer(WORDS))).datasets["train"]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
    two = attach(SFTDataModule(source, None, num_proc=2, tokenizer=word_tokenizer(WORDS))).datasets["train"]
    assert one.table.with_format(None)[:] == two.table.with_format(None)[:]
    assert not multiprocessing.active_children()


def test_dropped_and_truncated_rows_are_counted_and_never_dealt(tmp_path):
    rows = [{"prompt": "how", "chosen": " yes" * n, "rejected": " no"} for n in (1, 9, 2)]
    source = write(tmp_path / "pairs.jsonl", [*rows, {"prompt": "how", "chosen": " no", "rejected": " no"}])
    module = attach(PreferenceDataModule(source, None, max_length=6, tokenizer=word_tokenizer(WORDS)))
    [report] = module.datasets["train"].reports
    assert (report.rows, report.kept) == (4, 2)
    assert report.dropped == {"too long": 1, "ties: chosen equals rejected": 1}
    assert module.num_rows("train") == 2
    [batch] = module.train_dataloader()
    assert sorted(batch.row_ids.tolist()) == [0, 1] and len(batch.packed.input_ids) == (1 + 2 + 2) + (1 + 3 + 2)
    cut = attach(SFTDataModule(sft_file(tmp_path), None, max_length=4, tokenizer=word_tokenizer(WORDS)))
    assert cut.datasets["train"].reports[0].truncated == 12, "completions of 3, 4 and 5 words"


def test_several_sources_are_mixed_by_weight(tmp_path):
    few = write(tmp_path / "few.jsonl", [{"text": "how so"}] * 4)
    many = write(tmp_path / "many.jsonl", [{"text": "it is yes"}] * 10)
    module = attach(SFTDataModule({few: 3.0, many: 0.5}, None, batch_size=1, tokenizer=word_tokenizer(WORDS)))
    lengths = [len(batch.packed.input_ids) for batch in module.train_dataloader()]
    assert sorted(lengths) == [3] * 12 + [4] * 5
    assert len(module.datasets["train"].reports) == 2


def test_predict_plays_prompts_in_their_order_with_their_columns(tmp_path):
    source = write(tmp_path / "prompts.jsonl", [{"prompt": "how" + " so" * i, "id": i} for i in range(5)])
    module = SFTDataModule(sft_file(tmp_path), None, predict=source, max_prompt_length=3)
    module.tokenizer = word_tokenizer(WORDS)
    [batch] = attach(module, "predict").predict_dataloader()
    assert isinstance(batch, PromptBatch)
    assert batch.columns["id"] == [0, 1, 2, 3, 4] and batch.columns["prompt"][1] == "how so"
    assert [len(ids) for ids in batch.prompt_ids] == [1, 2, 3, 3, 3]
    assert module.sample_prompts(2).columns["id"] == [0, 1]


def test_the_prompts_of_rollouts_keep_their_numbers_on_whatever_rank_and_in_whatever_batch(tmp_path):
    write_inputs(tmp_path)
    _, data = make_stage("ppo", tmp_path)
    data.num_slots = 1  # batches of at most four
    data.prompts["predict"] = PromptBatch([np.array([i]) for i in range(10)], {}, np.arange(10))
    batches = []
    for rank in (0, 1):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        batches += data.predict_dataloader()
    assert len(batches) == 4
    assert [batch.numbers.tolist() for batch in batches] == [np.concatenate(b.prompt_ids).tolist() for b in batches]


def test_prompts_of_held_out_rows_stand_in_for_predict(tmp_path):
    source = pair_file(tmp_path, 3)
    module = attach(PreferenceDataModule(source, source, tokenizer=word_tokenizer(WORDS)), "predict")
    [batch] = module.predict_dataloader()
    assert batch.columns == {"prompt": ["how so"] * 3, "completion": [" yes", " yes yes", " yes yes yes"]}
    with pytest.raises(UserError, match="predict needs prompts"):
        attach(PreferenceDataModule(source, None, tokenizer=word_tokenizer(WORDS)), "predict")


def test_load_prompts_keeps_columns_that_only_some_rows_have(tmp_path):
    source = write(tmp_path / "p.jsonl", [{"prompt": "how", "answer": 3}, {"prompt": "so", "note": [1, "x"]}])
    prompt_ids, columns = load_prompts(source, "train", word_tokenizer(WORDS))
    assert [ids.dtype for ids in prompt_ids] == [np.int64] * 2
    assert columns == {"prompt": ["how", "so"], "answer": [3, None], "note": [None, [1, "x"]]}


def test_prompts_are_tokenised_once_by_several_processes_and_then_found(tmp_path, monkeypatch):
    source = write(tmp_path / "p.jsonl", [{"prompt": "how so", "answer": i} for i in range(8)])
    tokenizer, calls = word_tokenizer(WORDS), []
    in_order, _ = load_prompts(source, "train", tokenizer)
    real = examples.FUNCTIONS["prompts"]
    monkeypatch.setitem(examples.FUNCTIONS, "prompts", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    found, columns = load_prompts(source, "train", tokenizer)
    assert not calls and columns["answer"] == list(range(8))
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in in_order]
    shorter, _ = load_prompts(source, "train", tokenizer, max_prompt_length=1)
    assert calls and [len(ids) for ids in shorter] == [1] * 8
    monkeypatch.setitem(examples.FUNCTIONS, "prompts", real)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
    parallel, _ = load_prompts(source, "train", tokenizer, num_proc=2)
    assert [ids.tolist() for ids in parallel] == [ids.tolist() for ids in in_order]


def test_the_prompts_of_rollouts_are_tokenised_by_as_many_processes_as_asked(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(rollouts, "load_prompts", lambda *a, num_proc: asked.append(num_proc) or load_prompts(*a))
    write_inputs(tmp_path)
    module, data = make_stage("ppo", tmp_path)
    data.num_proc = 2
    make_trainer(tmp_path, limit_val_batches=1).validate(module, data, verbose=False)
    assert asked == [2]  # once, by `prepare_data`
    with pytest.raises(UserError, match=r"num_proc \(0\)"):
        RolloutDataModule(data.reward, "prompts.jsonl", None, num_proc=0)


def test_a_bad_row_reaches_the_user_as_one_message(tmp_path):
    source = write(tmp_path / "bad.jsonl", [{"text": "how"}, {"txt": "so"}])
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2: expected the columns"):
        attach(SFTDataModule(source, None, tokenizer=word_tokenizer(WORDS)))


@pytest.mark.parametrize("make", [SFTDataModule, PreferenceDataModule])
def test_empty_data_are_an_error_that_says_what_was_expected(tmp_path, make):
    source = write(tmp_path / "empty.jsonl", [])
    with pytest.raises(UserError, match=r"empty\.jsonl: there are no rows; expected `"):
        attach(make(source, None, tokenizer=word_tokenizer(WORDS)))
    with pytest.raises(UserError, match="there are no rows; expected `prompt`"):
        load_prompts(source, "train", word_tokenizer(WORDS))


def test_no_row_left_is_an_error_with_the_reasons(tmp_path):
    with pytest.raises(UserError, match=r"no row is left .* 20 dropped \(20 too long\)"):
        attach(PreferenceDataModule(pair_file(tmp_path), None, max_length=3, tokenizer=word_tokenizer(WORDS)))
    source = write(tmp_path / "long.jsonl", [{"prompt": "how so very", "completion": " yes"}] * 4)
    with pytest.raises(UserError, match="4 whose prompt alone reaches max_length: shorten prompts or raise"):
        attach(SFTDataModule(source, None, max_length=3, tokenizer=word_tokenizer(WORDS)))


def test_options_that_cannot_be_honoured_are_refused_by_name(tmp_path):
    source, tokenizer = sft_file(tmp_path), word_tokenizer(WORDS)
    with pytest.raises(UserError, match=r"data.validation is still 'demo' while data.train is"):
        SFTDataModule(source)
    with pytest.raises(UserError, match="max_tokens and batch_size are both null"):
        SFTDataModule(source, None, max_tokens=None)
    for limit in ("max_tokens", "batch_size"):
        with pytest.raises(UserError, match=rf"{limit} \(-1\) must be 1 or more, or null"):
            SFTDataModule(source, None, **{limit: -1})
    with pytest.raises(UserError, match="SFTDataModule needs the model's tokenizer"):
        attach(SFTDataModule(source, None))
    with pytest.raises(UserError, match=r"overfit_batches \(2\) would replace the plan"):
        attach(SFTDataModule(source, None, tokenizer=tokenizer), overfit_batches=2).train_dataloader()
    schedule = [GradientAccumulationScheduler({0: 1, 2: 4})]
    with pytest.raises(UserError, match="GradientAccumulationScheduler"):
        attach(SFTDataModule(source, None, tokenizer=tokenizer), callbacks=schedule).train_dataloader()
    with pytest.raises(UserError, match="chat_template: neither a Jinja template nor a file"):
        attach(SFTDataModule(source, None, chat_template="gone.jinja", tokenizer=tokenizer))
    tokenizer.model_max_length = 16
    with pytest.raises(UserError, match=r"max_length \(17\) is more than the model's context of 16"):
        attach(SFTDataModule(source, None, max_length=17, tokenizer=tokenizer))


def test_the_context_of_the_model_is_the_default_length_limit(tmp_path):
    tokenizer = word_tokenizer(WORDS)
    assert attach(SFTDataModule(sft_file(tmp_path), None, tokenizer=tokenizer)).length_limit is None
    tokenizer.model_max_length = 4
    module = attach(SFTDataModule(sft_file(tmp_path), None, tokenizer=tokenizer))
    assert module.datasets["train"].lengths().max() == 4


def test_a_template_from_a_file_is_the_tokenizers_from_then_on(tmp_path):
    (tmp_path / "chat.jinja").write_text(CHATML)
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    source = write(tmp_path / "chat.jsonl", [{"messages": messages}])
    tokenizer = byte_tokenizer()
    module = SFTDataModule(source, None, chat_template=str(tmp_path / "chat.jinja"), tokenizer=tokenizer)
    [batch] = list(attach(module).train_dataloader())
    assert tokenizer.chat_template == CHATML
    assert tokenizer.decode(batch.packed.target_ids) == "r<|im_end|>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jsonl", "a.jsonl"),
        ("[a, b]", ["a", "b"]),
        ("{a: 0.5, b: 2}", {"a": 0.5, "b": 2.0}),
        ("[{source: a, weight: 2, split: test}]", [{"source": "a", "weight": 2, "split": "test"}]),
    ],
)
def test_yaml_names_sources_in_every_form(text, expected):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SFTDataModule, "data", skip={"tokenizer"})
    assert parser.parse_args([f"--data.train={text}", "--data.loss_on=all"]).data.train == expected


class Reader(LightningModule):
    """Learns nothing, notes which rows it sees."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated, self.predicted = [], [], []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.row_ids.tolist())
        return self.w / batch.denominator

    def validation_step(self, batch, batch_idx):
        self.validated += batch.row_ids.tolist()

    def predict_step(self, batch, batch_idx):
        return len(batch.prompt_ids)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if len(self.seen) == 4:  # two steps of two micro-batches
            self.trainer.save_checkpoint(Path(self.trainer.default_root_dir) / "step2.ckpt")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_trainer_takes_every_loader_and_resumes_in_mid_epoch(tmp_path, workers):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}

    def run(ckpt_path=None):
        source, reader = pair_file(tmp_path), Reader()
        module = PreferenceDataModule(
            source, source, max_tokens=30, num_workers=workers, tokenizer=word_tokenizer(WORDS)
        )
        trainer = Trainer(
            default_root_dir=tmp_path, max_epochs=2, accumulate_grad_batches=2, enable_checkpointing=False, **quiet
        )
        trainer.fit(reader, module, ckpt_path=ckpt_path)
        return reader, trainer, module

    whole, trainer, module = run()
    per_epoch = len(whole.seen) // 2
    for epoch in (whole.seen[:per_epoch], whole.seen[per_epoch:]):
        assert sorted(itertools.chain(*epoch)) == list(range(20))
    assert whole.seen[:per_epoch] != whole.seen[per_epoch:]
    assert sum(trainer.predict(whole, module)) == 20
    resumed, _, _ = run(tmp_path / "step2.ckpt")
    assert resumed.seen == whole.seen[4:]
    assert sorted(resumed.validated) == sorted([*range(20)] * 2)


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data folder with real rows")
def test_real_conversations_keep_most_rows_and_share_their_prompts():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "gpt2")
    template = "{% for m in messages %}{{ '\n\n' + m.role + ': ' + m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '\n\nassistant: ' }}{% endif %}"
    source = str(SHARED / "preference" / "hh_helpful_test.jsonl.gz")
    module = attach(PreferenceDataModule(source, None, max_length=512, chat_template=template, tokenizer=tokenizer))
    [report] = module.datasets["train"].reports
    assert report.rows == 1000 and report.kept > 850 and set(report.dropped) == {"too long"}
    batch = next(iter(module.train_dataloader()))
    lengths = [len(nodes) for nodes in batch.packed.layout.buckets]
    assert lengths and len(batch.packed.input_ids) <= 4096
    table = module.datasets["train"].table.with_format(None)
    rows = [row for row in table.select(range(50)) if row["chosen_ids"]]
    assert all(row["chosen_ids"][-1] == row["rejected_ids"][-1] == tokenizer.eos_token_id for row in rows)
    assert all(tokenizer.decode(row["prompt_ids"]).endswith("assistant:") for row in rows), "the space joins the answer"
