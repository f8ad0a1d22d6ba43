"""Every row of the table of faults in the documentation has a test that runs."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TABLE = (TESTS.parent / "docs" / "reference" / "faults.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| (F\d\d) \|(.*)\|$", TABLE, flags=re.MULTILINE))


def defined_tests() -> dict[str, list[str]]:
    """Names of all tests, each with the names of its decorators that leave it out."""
    found = {}
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
                found[node.name] = [d for d in decorators if re.search(r"\.(skip|xfail)\b", d)]
    return found


DEFINED = defined_tests()


def test_rows_are_numbered_without_gaps():
    assert list(ROWS) == [f"F{number:02}" for number in range(1, len(ROWS) + 1)]
    assert len(ROWS) > 66


@pytest.mark.parametrize("row", ROWS)
def test_a_row_has_a_test(row):
    named = re.findall(r"`(test_\w+)`", ROWS[row])
    tests = named or [name for name in DEFINED if re.search(rf"_{row}(_|$)", name, flags=re.IGNORECASE)]
    assert tests, f"No test has {row} in its name."
    assert [name for name in tests if name not in DEFINED] == []
    assert [name for name in tests if DEFINED[name]] == []
