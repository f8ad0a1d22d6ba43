"""Write the tutorials as notebooks: `python scripts/dev/write_notebooks.py`.

Each page of docs/tutorials becomes docs/notebooks/NAME.ipynb, with a cell for every block of Python or shell. A test
compares them with the pages, and runs one in a kernel.
"""

from pathlib import Path

import jupytext
import nbformat

DOCS = Path(__file__).resolve().parents[2] / "docs"
# Says that shell is the other language, also on pages with more shell than Python.
_PYTHON = "---\njupyter:\n  kernelspec: {display_name: Python 3, language: python, name: python3}\n---\n"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))


def notebook_of(page: Path) -> nbformat.NotebookNode:
    """Convert a page: its prose becomes Markdown cells, its Python and shell blocks code cells."""
    notebook = jupytext.reads(_PYTHON + page.read_text(encoding="utf-8"), fmt="md")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # the ids of nbformat are random
        cell.metadata = {}
    notebook.metadata.pop("jupytext", None)
    nbformat.validate(notebook)
    return notebook


def main() -> None:
    for page in TUTORIALS:
        path = DOCS / "notebooks" / f"{page.stem}.ipynb"
        path.parent.mkdir(exist_ok=True)
        path.write_text(nbformat.writes(notebook_of(page)) + "\n", encoding="utf-8")
        print(path.relative_to(DOCS.parent))


if __name__ == "__main__":
    main()
