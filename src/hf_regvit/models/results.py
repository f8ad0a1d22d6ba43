"""The form that results share: short texts for a terminal and a notebook, a JSON file, versions and times."""

import html
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from .configuration_regvit import __version__
from .saving import read_json, write_json

Record = dict[str, Any]  # plain values, as in a JSON file


def show(value: object, form: str = ".4g", *, missing: str = "-") -> str:
    """Return a value as text: floats in the given format, None as `missing`."""
    return missing if value is None else f"{value:{form}}" if isinstance(value, float) else str(value)


def markdown_table(rows: Iterable[Sequence[object]]) -> str:
    """Return rows of cells as an aligned Markdown table; the first row is the head."""
    cells = [[show(cell).replace("|", "/") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in cells)


def html_table(rows: Iterable[Sequence[object]]) -> str:
    """Return rows of cells as an HTML table; the first row is the head."""
    lines = ["".join(f"<td>{html.escape(show(cell))}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def as_tuples(value: Any) -> Any:
    """Return a value from a JSON file with tuples for lists, at every depth of lists."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def library_versions() -> dict[str, str]:
    """Return the versions of this package, of the libraries that determine its numbers, and of Python."""
    import numpy
    import torch
    import transformers

    libraries = {module.__name__: module.__version__ for module in (torch, transformers, numpy)}
    return {"hf_regvit": __version__, **libraries, "python": platform.python_version()}


class Stopwatch:
    """Stopwatch for consecutive steps."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """End a step."""
        now = time.perf_counter()
        self.laps[name], self.last = round(now - self.last, 2), now

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each step, and their sum."""
        return self.laps | {"total": round(sum(self.laps.values()), 2)}


@dataclass(frozen=True, repr=False)
class Result:
    """Base of the results: plain values, a JSON file, and short texts for a terminal and a notebook."""

    file_name: ClassVar[str]

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.verdict}>"

    def _repr_html_(self) -> str:
        return html_table(self.table_rows())

    @property
    def verdict(self) -> str:
        """Conclusion in one sentence."""
        raise NotImplementedError

    def table_rows(self) -> Sequence[Sequence[object]]:
        """Return the rows of a table for people."""
        raise NotImplementedError

    def to_dict(self) -> Record:
        """Return plain values for JSON."""
        return asdict(self)

    def save(self, folder: str | Path) -> Path:
        """Write the JSON file into `folder`, which is created if needed, and return its path."""
        path = Path(folder) / self.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.to_dict(), indent=1)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a report written by `save`; `path` is the file or its folder."""
        path = Path(path)
        return cls(**read_json(path / cls.file_name if path.is_dir() else path))
