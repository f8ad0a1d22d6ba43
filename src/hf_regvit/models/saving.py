"""Write results whole or not at all: JSON files, single files and folders."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# The file that makes a folder a checkpoint; it is moved last, so that no partial checkpoint is ever found.
_LAST = "config.json"


def write_json(path: str | Path, content: Mapping[str, Any] | Sequence[Any], *, indent: int = 2) -> None:
    """Write a dictionary or list as indented JSON, whole or not at all; NaN and infinity raise a ValueError."""
    text = json.dumps(content, indent=indent, allow_nan=False) + "\n"
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not JSON text; the message names the file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
        raise ValueError(f"'{path}' is not valid JSON text ({error}). Correct it, or write it again.") from error


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; the finished file replaces `path` at the end, after it is on the disk.

    If the block raises, `path` is left as it was. The temporary name holds the process id, because several processes
    may write the same file.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def apply_umask(folder: Path) -> None:
    """Give all files below a folder the permissions of new files; safetensors lets only their owner read them."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


@contextmanager
def whole_folder(output: str | Path) -> Iterator[Path]:
    """Yield a temporary folder inside `output`; its files are moved to `output` at the end, `config.json` last.

    Otherwise an interrupted run could leave a configuration without weights, which blocks the next run, or a model
    without its image processor, which would be used with the wrong statistics.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".unfinished-") as staged:
        yield Path(staged)
        apply_umask(Path(staged))
        for path in sorted(Path(staged).iterdir(), key=lambda path: path.name == _LAST):
            path.replace(output / path.name)
