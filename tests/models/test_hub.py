import http.server
import shutil
import socket
import threading

import datasets
import pytest
from huggingface_hub import close_session, constants, is_offline_mode

from lit_rlhf.errors import UserError
from lit_rlhf.models import hub
from lit_rlhf.models.loading import load_policy, load_policy_with_tokenizer
from tests.tiny import save_tiny

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """As on a machine whose user wants the hub, whether or not there is one."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "SECONDS", 0.2)
    hub._answers.cache_clear()
    yield
    hub._answers.cache_clear()
    close_session()  # pools keep sockets


class Answer(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_HEAD(self):
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(("status", "reached"), [(200, True), (404, True), (503, False)])
def test_a_hub_is_reached_if_it_answers_with_anything_but_an_error_of_its_own(server, monkeypatch, status, reached):
    monkeypatch.setattr(Answer, "status", status)
    assert hub.answers(server) is reached


def test_neither_a_closed_port_nor_silence_is_an_answer():
    assert hub.answers("http://127.0.0.1:9") is False
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert hub.answers(f"http://127.0.0.1:{silent.getsockname()[1]}") is False


def test_out_of_reach_the_libraries_look_into_the_cache_alone_and_only_meanwhile(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with hub.hub_or_cache("nobody/nothing") as why:
        assert is_offline_mode() and datasets.config.HF_HUB_OFFLINE
    assert why == "the hub (http://127.0.0.1:9) cannot be reached"
    assert not is_offline_mode() and not datasets.config.HF_HUB_OFFLINE
    with pytest.raises(KeyError), hub.hub_or_cache("nobody/nothing"):
        raise KeyError
    assert not is_offline_mode()


def test_nothing_is_asked_for_what_is_there_or_where_the_user_forbids_it(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "answers", lambda endpoint: pytest.fail("asked"))
    with hub.hub_or_cache(str(tmp_path)) as why:
        assert why == "" and not is_offline_mode()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with hub.hub_or_cache("nobody/nothing") as why:
        assert why == "HF_HUB_OFFLINE is set"
    assert is_offline_mode()


@pytest.mark.parametrize("name", ["gone", "nobody/gone"])
def test_a_misspelt_model_is_answered_without_retries(monkeypatch, name):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits {seconds} s"))
    with pytest.raises(UserError, match=f"{name}: no model could be loaded there .* there is no folder /"):
        load_policy(name)


def test_a_model_of_a_folder_is_loaded_without_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "get_session", lambda: pytest.fail("asked"))
    load_policy(save_tiny(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file", "'.*file': no model could be loaded there: expected a folder .*; this is a file"),
        ("", "'': no model could be loaded there: expected a folder .*; this is no name"),
        ("my model", "my model: no model could be loaded there: there is no folder /.*my model"),
        ("https://hub/x", "no model could be loaded there: there is no folder"),
        ("x" * 5000, r"'x{80}' cannot be the name of a model \(File name too long\)"),
        ("~no-such-user/x", "cannot be the name of a model"),
    ],
)
def test_what_can_be_no_model_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, name, message):
    monkeypatch.setattr(hub, "answers", lambda endpoint: pytest.fail("asks the hub"))
    (tmp_path / "file").write_text("{}")
    with pytest.raises(UserError, match=message):
        load_policy(str(tmp_path / "file") if name == "file" else name)


def test_what_stands_near_a_model_is_answered_with_what_to_name(tmp_path):
    model = save_tiny(tmp_path / "run" / "model")
    with pytest.raises(UserError, match=rf"; this is a file in the folder {model}: name that$"):
        load_policy(f"{model}/model.safetensors")
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(
        UserError, match=r"a checkpoint: lit-rlhf export --ckpt_path=/.*/last\.ckpt --folder=model writes"
    ):
        load_policy(tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=rf"no model could be loaded there .*; is it {model}\?$"):
        load_policy(tmp_path / "run")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "adapter_model.safetensors"])
def test_a_pointer_of_git_lfs_is_named_in_place_of_what_it_is_not(file, folder, tmp_path):
    pointing = shutil.copytree(folder, tmp_path / "pointing")
    (pointing / "pytorch_model.bin").write_bytes(POINTER)  # nothing reads it beside safetensors
    load_policy(pointing)
    (pointing / file).write_bytes(POINTER)
    with pytest.raises(UserError, match=rf"pointing: {file} is a pointer of Git LFS, .* \(git lfs pull\)$"):
        load_policy(pointing)


def test_weights_of_another_kind_that_are_a_pointer_are_named_where_there_are_no_others(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(POINTER)
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pointer of Git LFS"):
        hub.resolve(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"]
)
def test_a_byte_order_mark_is_named_with_its_file(file, encoding, folder, tmp_path):
    marked = shutil.copytree(folder, tmp_path / "marked")
    text = (folder / file).read_text() if (folder / file).exists() else "{}"
    (marked / file).write_text(text, encoding=encoding)
    with pytest.raises(UserError, match=rf"marked: {file} begins with a byte order mark: save it as UTF-8 without one"):
        load_policy_with_tokenizer(marked)


class Hub:
    """In the place of the hub's client; notes what is asked of it."""

    def __init__(self):
        self.asked = []

    def create_repo(self, repo, private, exist_ok):
        self.asked.append(("create", repo, private, exist_ok))

    def upload_folder(self, repo_id, folder_path):
        self.asked.append(("upload", repo_id, folder_path))
        return f"https://hub/{repo_id}"


def test_a_folder_is_uploaded_to_a_repository_that_is_made_if_need_be(monkeypatch, tmp_path):
    client = Hub()
    monkeypatch.setattr(hub, "HfApi", lambda: client)
    assert hub.push(tmp_path, "me/it", private=True) == "https://hub/me/it"
    assert client.asked == [("create", "me/it", True, True), ("upload", "me/it", tmp_path)]


def test_an_upload_without_a_hub_is_told_in_a_line_with_the_command_that_does_it_later(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=rf"push: me/it was not uploaded \(.*hf upload me/it {tmp_path}") as refused:
        hub.push(tmp_path, "me/it")
    assert "\n" not in str(refused.value)
