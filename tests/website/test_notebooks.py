"""A chapter as a notebook."""

import pytest

nbformat = pytest.importorskip("nbformat", reason="notebooks need the extra docs")

from website.notebooks import notebook  # noqa: E402

PAGE = """# A page

<details markdown><summary>The figure</summary>

```python
print(1)
```

```text
1
```

</details>

![a figure](figures/a.svg)

The end.
"""


def test_cells_keep_their_order_and_what_they_print():
    made = notebook(PAGE)
    nbformat.validate(made)
    assert [(cell.cell_type, cell.source) for cell in made.cells] == [
        ("markdown", "# A page"),
        ("code", "print(1)"),
        ("markdown", "The end."),
    ]
    assert made.cells[1].outputs[0].text == "1\n"


def test_the_same_page_gives_the_same_file():
    assert nbformat.writes(notebook(PAGE)) == nbformat.writes(notebook(PAGE))
