"""A chapter of the course as a Jupyter notebook."""

import re

import nbformat

from website.chapters import cells

FIGURE = re.compile(r"^!\[[^\]]*\]\(figures/[^)]*\)\n", re.M)
FOLD = re.compile(r"^</?(?:details|summary).*\n", re.M)


def notebook(page: str) -> nbformat.NotebookNode:
    """A page as a notebook: its cells with what they print, its text between them.

    Figures are left to the cells that draw them; what is folded on the page is open.
    """
    made, before = nbformat.v4.new_notebook(), 0
    for cell in [*cells(page), None]:
        text = FIGURE.sub("", FOLD.sub("", page[before : cell.start if cell else len(page)])).strip()
        if text:
            made.cells.append(nbformat.v4.new_markdown_cell(text))
        if cell:
            outputs = [nbformat.v4.new_output("stream", name="stdout", text=cell.output)] if cell.output else []
            made.cells.append(nbformat.v4.new_code_cell(cell.code.rstrip(), outputs=outputs))
            before = cell.end
    for number, cell in enumerate(made.cells):
        cell["id"] = f"cell-{number}"  # the same file from the same page
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return made
