"""Attempts at running code, reading what was not named or taking all memory, by what a stranger may hand over.

Each is a file that could come from anywhere: a checkpoint, a model's folder, rows, a YAML. None is trusted.
"""

import gzip
import io
import json
import os
import pathlib
import pickle
import shutil
import socket
import subprocess
import tracemalloc
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save_file

from lit_rlhf import SFT, UserError
from lit_rlhf.algorithms import reference_cache
from lit_rlhf.algorithms.checkpoint import read_facts, read_weights
from lit_rlhf.cli.checkpoints import require_checkpoint
from lit_rlhf.data.chat import Renderer
from lit_rlhf.data.row_files import read_rows
from lit_rlhf.models.loading import load_policy, load_policy_with_tokenizer
from lit_rlhf.rollout.rewards import RewardModelReward
from tests.cli.command_line import QUICK, run
from tests.tiny import tiny_tokenizer

MESSAGES = [{"role": "user", "content": "w3"}]


@pytest.fixture(autouse=True)
def unharmed(tmp_path, monkeypatch):
    """Every attempt would leave a file; none may."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob("harm*"))


class Calls:
    """Pickled, it is a call."""

    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


HARM = {
    "os.system": Calls(os.system, "touch harm"),
    "subprocess.Popen": Calls(subprocess.Popen, ["touch", "harm"]),
    "eval": Calls(eval, "open('harm', 'w')"),
    "exec": Calls(exec, "open('harm', 'w')"),
    "open": Calls(io.open, "harm", "w"),
    "Path.touch": Calls(pathlib.Path.touch, pathlib.PosixPath("harm")),
    "shutil.copyfile": Calls(shutil.copyfile, "/etc/hostname", "harm"),
    "torch.save": Calls(torch.save, [1], "harm"),
}
CHECKPOINT = {"loops": {}, "pytorch-lightning_version": "2.6.6", "state_dict": {"policy.model.w": torch.ones(2)}}


def holding(place, harm):
    """A checkpoint that holds something in one of its parts."""
    if place == "itself":
        return harm
    return CHECKPOINT | {place: {"of a run": [harm]}}


def saved(content, file, form="archive"):
    """Written as torch does today, as it did, or as pickle does."""
    if form == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "archive")
    return file


def refuses_checkpoint(file):
    """Whatever reads a checkpoint reads no code."""
    with pytest.raises(UserError, match=r"damaged, or holds more than tensors|no checkpoint of the Trainer's"):
        require_checkpoint(file, training=True)
    for read in (read_facts, lambda path: read_weights(path, "policy"), SFT.load_from_checkpoint):
        with pytest.raises((pickle.UnpicklingError, RuntimeError, UserError, ValueError)):
            read(file)


@pytest.mark.parametrize("harm", HARM)
def test_a_checkpoint_that_is_a_call_is_refused(tmp_path, harm):
    refuses_checkpoint(saved(HARM[harm], tmp_path / "a.ckpt"))


@pytest.mark.parametrize(
    "place", ["state_dict", "optimizer_states", "hyper_parameters", "loops", "callbacks", "summary"]
)
def test_a_checkpoint_that_holds_a_call_in_any_of_its_parts_is_refused(tmp_path, place):
    refuses_checkpoint(saved(holding(place, HARM["os.system"]), tmp_path / "a.ckpt"))


@pytest.mark.parametrize("form", ["older torch", "pickle"])
def test_a_checkpoint_of_another_form_is_refused_too(tmp_path, form):
    refuses_checkpoint(saved(HARM["os.system"], tmp_path / "a.ckpt", form))


def test_a_checkpoint_whose_parts_would_lie_elsewhere_is_not_unpacked(tmp_path):
    file = saved(CHECKPOINT, tmp_path / "run.ckpt")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("../harm", "here")
        archive.writestr("/harm", "here")
    with pytest.raises(UserError, match="damaged"):
        require_checkpoint(file)


def test_a_checkpoint_that_unpacks_to_a_thousand_times_its_size_is_refused_without_being_held(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 26))
    tracemalloc.start()
    with pytest.raises(UserError, match="damaged"):
        require_checkpoint(tmp_path / "bomb.ckpt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 25


@pytest.fixture
def model(folder, tmp_path):
    """A model's folder that may be tampered with."""
    return shutil.copytree(folder, tmp_path / "model")


def with_json(file, **entries):
    """Add entries to a file of JSON."""
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


CODE = "open('harm', 'w')\n\n\nclass Its:\n    pass\n"
CLASSES = {
    "AutoConfig": "code.Its",
    "AutoModelForCausalLM": "code.Its",
    "AutoModelForSequenceClassification": "code.Its",
}


@pytest.mark.parametrize("harm", ["os.system", "exec", "open"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_weights_that_are_a_call_are_not_read(model, harm, sharded):
    (model / "model.safetensors").unlink()
    saved(HARM[harm], model / "pytorch_model.bin")
    if sharded:
        shards = {"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model.bin"}}
        (model / "pytorch_model.bin").rename(model / "pytorch_model-1.bin")
        (model / "pytorch_model.bin.index.json").write_text(json.dumps(shards).replace("model.bin", "model-1.bin"))
    with pytest.raises(Exception) as refused:
        load_policy(model)
    assert isinstance(refused.value, UserError | pickle.UnpicklingError | RuntimeError)


@pytest.mark.parametrize(
    ("file", "entries"),
    [
        ("config.json", {"auto_map": CLASSES, "model_type": "its_own"}),
        ("config.json", {"auto_map": {name: f"other/repository--{code}" for name, code in CLASSES.items()}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["code.Its", "code.Its"]}}),
        ("tokenizer_config.json", {"tokenizer_class": "os.system", "auto_map": {"AutoTokenizer": [None, "code.Its"]}}),
        ("config.json", {"model_type": "os.system"}),
        ("config.json", {"architectures": ["os.system"]}),
        ("config.json", {"tokenizer_class": "subprocess.Popen"}),
        ("config.json", {"_attn_implementation": "code.Its"}),
        ("config.json", {"quantization_config": {"quant_method": "code.Its"}}),
        ("generation_config.json", {"custom_generate": ".", "transformers_version": "5"}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_code_that_a_model_names_is_not_run(model, monkeypatch, file, entries):
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("asked the network"))
    for name in ("code.py", "custom_generate/generate.py"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(CODE)
    with_json(model / file, **entries)
    for load in (load_policy_with_tokenizer, lambda path: RewardModelReward(str(path))):
        try:
            load(model)
        except (UserError, OSError, ValueError, KeyError, AttributeError, ImportError) as error:
            assert "touch" not in str(error)


TEMPLATES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a loop": "{{ cycler.__init__.__globals__.os.system('touch harm') }}",
    "globals of lorem": "{{ lipsum.__globals__['os'].popen('touch harm').read() }}",
    "globals of raise_exception": "{{ raise_exception.__globals__['__builtins__']['open']('harm', 'w') }}",
    "globals of strftime_now": "{{ strftime_now.__globals__['__builtins__']['open']('harm', 'w') }}",
    "a namespace": "{{ namespace.__init__.__globals__ }}",
    "a joiner": "{{ joiner.__init__.__globals__ }}",
    "the template": "{{ self.__init__.__globals__ }}",
    "its context": "{{ self._TemplateReference__context.environment }}",
    "an attribute by filter": "{{ ''|attr('__class__') }}",
    "an attribute by format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "an attribute by map": "{{ messages|map(attribute='__class__')|list }}",
    "a file": "{% include '/etc/hostname' %}",
    "an import": "{% import 'os' as os %}{{ os.system('touch harm') }}",
    "a parent": "{% extends '/etc/hostname' %}",
    "a range without end": "{% for i in range(10 ** 12) %}{% endfor %}",
    "messages changed": "{{ messages.append(messages) }}",
    "code of a generator": "{{ (x for x in messages).gi_frame.f_globals }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_reaches_nothing_of_python(name):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    try:
        text = Renderer(tokenizer)(MESSAGES)
    except UserError as error:
        text = str(error)
    assert not {"<class", "<frame", "Environment", "__builtins__"} & {*text.replace("(", " ").split()}
    assert pathlib.Path("/etc/hostname").read_text().strip() not in text.split()
    assert MESSAGES == [{"role": "user", "content": "w3"}]


TAGS = {
    "apply": "!!python/object/apply:os.system ['touch harm']",
    "new": "!!python/object/new:subprocess.Popen [['touch', 'harm']]",
    "object": "!!python/object:subprocess.Popen {args: [touch, harm]}",
    "name": "!!python/name:os.system",
    "module": "!!python/module:antigravity",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tag", TAGS)
def test_a_config_makes_no_object_of_python_s(tmp_path, capsys, tag):
    (tmp_path / "run.yaml").write_text(f"seed_everything: {TAGS[tag]}\n")
    assert run("fit", "--config", tmp_path / "run.yaml", *QUICK) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("option", ["model", "data", "model.init_args.kl", "trainer.callbacks", "trainer.logger"])
def test_a_config_makes_no_object_that_is_no_component(tmp_path, capsys, option):
    harm = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "harm"]}}
    config = {
        "model": {"class_path": "lit_rlhf.PPO", "init_args": {}},
        "data": {"class_path": "lit_rlhf.SFTDataModule"},
    }
    *outer, last = option.split(".")
    holder = config
    for name in outer:
        holder = holder.setdefault(name, {})
    holder[last] = [harm] if last == "callbacks" else harm
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert run("fit", "--config", tmp_path / "run.yaml", *QUICK) == 2
    assert "error: " in capsys.readouterr().err


def test_rows_of_parquet_make_no_object_of_python_s(tmp_path):
    made = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(HARM["open"]),
    }
    field = pa.field("text", pa.string(), metadata=made)
    pq.write_table(pa.table([pa.array(["w3"])], schema=pa.schema([field])), tmp_path / "rows.parquet")
    assert [row for _, row in read_rows(tmp_path / "rows.parquet")] == [{"text": "w3"}]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["rows.py", "rows.pkl", "rows.jsonl", "rows.parquet", "rows.csv.gz"])
def test_code_and_pickles_in_the_place_of_rows_are_not_run(tmp_path, name):
    content = CODE.encode() if name == "rows.py" else pickle.dumps(HARM["open"])
    (tmp_path / name).write_bytes(content)
    config = {"class_path": "lit_rlhf.SFTDataModule", "init_args": {"train": str(tmp_path / name), "validation": None}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": "lit_rlhf.SFT", "data": config}))
    assert run("fit", "--config", tmp_path / "run.yaml", *QUICK) == 2


@pytest.mark.filterwarnings("ignore")
def test_a_script_beside_the_rows_of_a_folder_is_not_run(tmp_path):
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "rows.py").write_text(CODE)
    (rows / "train.jsonl").write_text('{"text": "w3"}\n')
    config = {"class_path": "lit_rlhf.SFTDataModule", "init_args": {"train": str(rows), "validation": None}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": "lit_rlhf.SFT", "data": config}))
    options = ["--trainer.max_steps=1", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    assert run("fit", "--config", tmp_path / "run.yaml", *QUICK, *options, "--export.folder=null") in (0, 2)


def test_rows_that_unpack_to_a_thousand_times_their_size_are_read_one_by_one(tmp_path):
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wt") as file:
        for _ in range(8):
            file.write('{"text": "w3"}\n' * (1 << 14))  # 2 MB in all
    tracemalloc.start()
    assert sum(1 for _ in read_rows(tmp_path / "bomb.jsonl.gz")) == 1 << 17
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.filterwarnings("ignore")
def test_a_cache_that_somebody_has_put_a_call_into_is_computed_anew(tmp_path):
    file = saved(HARM["os.system"], tmp_path / "log_probs.safetensors")
    assert reference_cache.read(file) is None
    forged = {"logprobs": torch.zeros(2, 2)}
    save_file(forged, file, metadata={"sha256": "of another"})
    assert reference_cache.read(file) is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", ["fit", "predict"])
def test_a_run_on_local_files_asks_nothing_of_the_network(inputs, tmp_path, monkeypatch, command):
    asked = []
    for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: asked.append(args) or pytest.fail("asked the network"))
    init = {"train": str(inputs / "sft.jsonl"), "validation": str(inputs / "sft.jsonl")}
    model = {
        "class_path": "lit_rlhf.SFT",
        "init_args": {"policy": str(inputs / "model"), "generation": {"max_new_tokens": 4}},
    }
    config = {"model": model, "data": {"class_path": "lit_rlhf.SFTDataModule", "init_args": init}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    steps = ["--trainer.max_steps=2"] if command == "fit" else ["--trainer.limit_predict_batches=1"]
    assert run(command, "--config", tmp_path / "run.yaml", *QUICK, *steps, "--trainer.default_root_dir=run") == 0
    assert asked == []
