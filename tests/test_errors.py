import pytest

from lit_rlhf.errors import UserError, looks_like_a_path, place_of, require


@pytest.mark.parametrize("name", ["./model", "../model", "/nowhere/model", "~/model", "a/b/c", r"runs\sft", ".hidden"])
def test_a_name_with_dots_or_several_slashes_was_meant_as_a_path(name):
    assert looks_like_a_path(name)


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B", "demo", "owner/name.v2"])
def test_a_name_of_a_hub_was_not(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not looks_like_a_path(name)


def test_a_name_in_a_folder_that_is_there_was_meant_as_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert looks_like_a_path("runs/sft") and not looks_like_a_path("owner/sft")


def test_what_does_not_hold_is_refused_with_name_value_and_what_is_expected():
    require(True, "beta", 0.0, "more than 0")
    with pytest.raises(UserError, match=r"^beta \(0\.0\) must be more than 0$"):
        require(False, "beta", 0.0, "more than 0")


def raised_by(call):
    try:
        call()
    except Exception as error:
        return error


def test_the_place_of_an_error_is_the_last_line_of_the_file_of_the_called_function(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import json\n\ndef outer():\n    inner()\n\ndef inner():\n    json.loads('{')\n")
    names = {"__name__": "mine"}
    exec(compile(file.read_text(), str(file), "exec"), names)
    assert place_of(raised_by(lambda: names["outer"]())) != ""

    def caller():
        names["outer"]()

    error = raised_by(caller)
    error = error.with_traceback(error.__traceback__.tb_next)  # from the function that called
    assert place_of(error) == f", in {file}:7"  # not within json


def test_a_call_that_itself_failed_has_no_place():
    def two(a, b):
        return a + b

    error = raised_by(lambda: two(1))
    assert place_of(error.with_traceback(error.__traceback__.tb_next)) == ""
