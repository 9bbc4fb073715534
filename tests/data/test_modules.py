import itertools
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from transformers import AutoTokenizer

from lit_rlhf.data import examples
from lit_rlhf.data.batches import PreferenceBatch, PromptBatch, SFTBatch
from lit_rlhf.data.modules import PreferenceDataModule, SFTDataModule
from lit_rlhf.errors import UserError
from tests.data.small_rows import WORDS, attach, pair_file, sft_file, write
from tests.tiny_tokenizers import CHATML, byte_tokenizer, word_tokenizer


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


def test_rows_of_declared_columns_and_shape_are_learnt_validated_and_predicted(tmp_path):
    columns = {"prompt": "question", "completion": "answer"}
    (tmp_path / "rows.csv").write_text("question,answer\nhow so, yes\n")
    source, rows = str(tmp_path / "rows.csv"), [{"prompt": "how so", "completion": " yes"}]
    module = attach(SFTDataModule(source, source, columns=columns, tokenizer=word_tokenizer(WORDS)))
    plain = SFTDataModule(write(tmp_path / "plain.jsonl", rows), None, tokenizer=word_tokenizer(WORDS))
    expected = attach(plain).datasets["train"].table.with_format(None)[:]
    for name in ("train", "validation"):
        assert module.datasets[name].table.with_format(None)[:] == expected
    assert module.sample_prompts(1).columns == {"prompt": ["how so"], "completion": [" yes"]}
    alpaca = write(tmp_path / "alpaca.jsonl", [{"instruction": "q", "output": "r"}])
    module = SFTDataModule(alpaca, None, format="alpaca", chat_template=CHATML, tokenizer=byte_tokenizer())
    [batch] = attach(module).train_dataloader()
    assert module.tokenizer.decode(batch.packed.target_ids) == "r<|im_end|>"


def test_fit_without_rows_is_refused_and_predict_needs_none_to_learn_from(tmp_path):
    source = pair_file(tmp_path, 3)
    with pytest.raises(UserError, match=r"data\.train is null, and fit needs rows"):
        attach(PreferenceDataModule(None, source, tokenizer=word_tokenizer(WORDS)))
    module = PreferenceDataModule(None, source, tokenizer=word_tokenizer(WORDS))
    [batch] = attach(module, "predict").predict_dataloader()
    assert len(batch.prompt_ids) == 3


@pytest.mark.parametrize("option", ["train", "validation", "test", "predict"])
def test_a_slip_in_a_source_is_told_with_its_option(option):
    given = {"train": "rows.jsonl", "validation": None} | {option: {"rows.jsonl": float("nan")}}
    with pytest.raises(UserError, match=rf"data\.{option}: weight \(nan\) of rows\.jsonl must be a number above 0"):
        SFTDataModule(**given)


def test_columns_under_names_that_nothing_reads_are_refused_by_the_option_that_names_them():
    said = r"^data\.train: columns names 'a' as 'texts', which nothing reads; did you mean text\?"
    with pytest.raises(UserError, match=said):
        SFTDataModule("rows.jsonl", None, columns={"texts": "a"})
    with pytest.raises(UserError, match=said.replace("train", "test")):
        SFTDataModule(test=[{"source": "rows.jsonl", "columns": {"texts": "a"}}])
    SFTDataModule(predict=[{"source": "rows.jsonl", "columns": {"texts": "a"}}])  # stands in what is written


def test_predict_plays_prompts_in_their_order_with_their_columns(tmp_path):
    source = write(tmp_path / "prompts.jsonl", [{"prompt": "how" + " so" * i, "id": i} for i in range(5)])
    module = SFTDataModule(sft_file(tmp_path), None, predict=source, max_prompt_length=3)
    module.tokenizer = word_tokenizer(WORDS)
    with pytest.warns(UserWarning, match=r"2 of 5 rows .* A prompt may have 3 tokens"):
        [batch] = attach(module, "predict").predict_dataloader()
    assert isinstance(batch, PromptBatch)
    assert batch.columns["id"] == [0, 1, 2, 3, 4] and batch.columns["prompt"][1] == "how so"
    assert [len(ids) for ids in batch.prompt_ids] == [1, 2, 3, 3, 3]
    assert module.sample_prompts(2).columns["id"] == [0, 1]


def test_prompts_of_held_out_rows_stand_in_for_predict(tmp_path):
    source = pair_file(tmp_path, 3)
    module = attach(PreferenceDataModule(source, source, tokenizer=word_tokenizer(WORDS)), "predict")
    [batch] = module.predict_dataloader()
    assert batch.columns == {"prompt": ["how so"] * 3, "completion": [" yes", " yes yes", " yes yes yes"]}
    with pytest.raises(UserError, match=r"data\.predict is null, and predict needs rows"):
        attach(PreferenceDataModule(source, None, tokenizer=word_tokenizer(WORDS)), "predict")


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
    module = attach(SFTDataModule(sft_file(tmp_path), None, tokenizer=tokenizer))
    assert module.datasets["train"].lengths().max() > 4
    tokenizer.model_max_length = 4
    with pytest.warns(UserWarning, match="12 of them truncated"):
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
        ("[{source: a, columns: {prompt: b}}, c]", [{"source": "a", "columns": {"prompt": "b"}}, "c"]),
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


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SPELT = [{"role": "user", "content": "q<|im_end|>"}]
UNFIT = {
    "control tokens": ({"prompt": SPELT}, {"control_tokens": "refuse"}, r"control tokens \['<\|im_end\|>'\]"),
    "tools": ({"prompt": CHAT[:1], "tools": [{"name": "f"}]}, {}, "column 'tools': the chat template has no place"),
    "arguments": ({"prompt": CHAT[:1], "chat_template_kwargs": {"x": 1}}, {}, "the chat template does not read x"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_a_row_says_and_cannot_have_is_named_by_file_and_line_in_every_kind_of_data(case, tmp_path):
    row, options, words = UNFIT[case]
    answers = {"completion": CHAT[1:], "chosen": CHAT[1:], "rejected": [CHAT[1] | {"content": "b"}]}
    source = write(tmp_path / "rows.jsonl", [{"prompt": CHAT[:1], **answers}, {**row, **answers}])
    options = {"tokenizer": byte_tokenizer(CHATML), **options}
    for make in (SFTDataModule, PreferenceDataModule):
        with pytest.raises(UserError, match=rf"rows\.jsonl, line 2: .*{words}"):
            attach(make(source, None, **options))
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 2: .*{words}"):
        attach(SFTDataModule(source, source, predict=source, **options), "predict")


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_data_are_looked_at_without_a_trainer_as_one_rank_would(tmp_path, kind):
    make, source = (SFTDataModule, sft_file) if kind == "sft" else (PreferenceDataModule, pair_file)
    alone, trained = (
        make(source(tmp_path), source(tmp_path, 21), max_tokens=40, tokenizer=word_tokenizer(WORDS)) for _ in range(2)
    )
    with pytest.raises(UserError, match=r"has read no rows of train yet: call prepare_data\(\) and setup\(\)"):
        alone.train_dataloader()
    alone.prepare_data()
    for stage in ("fit", "test", "predict"):
        alone.setup(stage)
        attach(trained, stage)
    for name in ("train", "val", "test"):
        loaders = [getattr(data, f"{name}_dataloader")() for data in (alone, trained)]
        ours, theirs = ([batch.packed.input_ids.tolist() for batch in loader] for loader in loaders)
        assert ours == theirs and len(ours) > 1
        denominators = [[float(batch.denominator) for batch in loader] for loader in loaders]
        assert denominators[0] == denominators[1]
    assert len(alone.predict_dataloader()) == len(trained.predict_dataloader()) == 1


def test_rows_that_were_looked_at_are_cut_anew_to_the_context_of_the_model_that_comes(tmp_path):
    module = SFTDataModule(sft_file(tmp_path), None, max_tokens=40, tokenizer=word_tokenizer(WORDS))
    module.setup("fit")
    longest = module.datasets["train"].lengths().max()
    module.tokenizer.model_max_length = 4
    with pytest.warns(UserWarning, match="12 of 20 rows are not used whole"):
        attach(module)
    assert longest > 4 == module.datasets["train"].lengths().max()
