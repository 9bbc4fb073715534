"""Chapters of the course print what they say, and become notebooks."""

import textwrap

import pytest

from website.chapters import cells, pages, printed, rewritten

PAGE = textwrap.dedent(
    """\
    # A page

    ```python
    x = 1
    print(x, " ")
    ```

    ```text
    1
    ```

    Words.

    ```python
    x += 1
    ```

    ```text
    not an output, since nothing was printed
    ```
    """
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_cells_print_what_stands_below_them(page, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the figures need the extra figures").use("Agg")
    (tmp_path / "figures").mkdir()
    monkeypatch.chdir(tmp_path)
    found = list(cells(page.read_text()))
    outputs = list(printed([cell.code for cell in found], page.stem))
    assert outputs == [cell.output for cell in found], "run make course"
    drawn = {file.name for file in (tmp_path / "figures").iterdir()}
    assert {name for name in drawn if not (page.parent / "figures" / name).exists()} == set(), "run make course"


def test_cells_share_one_namespace_and_outputs_are_rewritten():
    assert [cell.output for cell in cells(PAGE)] == ["1\n", "not an output, since nothing was printed\n"]
    assert list(printed([cell.code for cell in cells(PAGE)])) == ["1\n", ""]
    wrong = PAGE.replace("```text\n1\n", "```text\n7\n")
    assert rewritten(wrong) == PAGE.replace("\n```text\nnot an output, since nothing was printed\n```\n", "")


def test_a_cell_that_fails_is_told_by_its_page_and_number():
    with pytest.raises(ZeroDivisionError) as error:
        list(printed(["x = 1", "x / 0"], "credit"))
    assert str(error.traceback[-1].path) == "credit, cell 2"
