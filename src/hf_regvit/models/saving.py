"""Write results whole or not at all: JSON files, single files and folders. A full disk is an error of one sentence."""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

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


def read_object(path: str | Path) -> dict[str, Any]:
    """Return the content of a JSON file that holds an object.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not JSON text or holds something else; the message names the file.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(
            f"'{path}' holds a {type(content).__name__}, expected an object. Correct it, or write it again."
        )
    return content


# ---- Space -------------------------------------------------------------------------------------------------------


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NoSpaceError(OSError):
    """Full disk; the message has the file or folder and the bytes that are needed."""


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the size of a file with these tensors, in bytes."""
    return sum(tensor.nbytes for tensor in tensors)


def as_bytes(count: float) -> str:
    """Return a number of bytes as text, in MiB, or in KiB below one MiB."""
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def free_bytes(folder: Path) -> int:
    """Return the number of bytes that are free where a folder is or will be."""
    return shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free


def check_space(folder: str | Path, needed: int) -> None:
    """Check that a disk has space before the work starts.

    Raises:
        NoSpaceError: Fewer than `needed` bytes are free.
    """
    if (free := free_bytes(Path(folder))) < needed:
        raise NoSpaceError(
            f"'{folder}' needs about {as_bytes(needed)}, but only {as_bytes(free)} are free. Free some space, or "
            "choose a folder on another disk."
        )


@contextmanager
def explain_full_disk(path: Path, unfinished: Path | None = None, *, needed: int) -> Iterator[None]:
    """Turn the error of a full disk into a `NoSpaceError`; safetensors reports it as its own type.

    Args:
        path: File or folder that the error names.
        unfinished: Temporary file or folder in which `path` is written.
        needed: Size of the content in bytes, if it is known.

    Raises:
        NoSpaceError: The disk is full.
    """
    try:
        yield
    except NoSpaceError as error:  # of a file in the temporary folder
        error.args = (str(error).replace(str(unfinished), str(path)),)
        raise
    except (OSError, SafetensorError) as error:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else getattr(error, "errno", None)
        if number not in _FULL:
            raise
        parts = unfinished.rglob("*") if unfinished and unfinished.is_dir() else [unfinished or path]
        written = sum(part.stat().st_size for part in parts if part.is_file())
        most = f"about {as_bytes(needed)}" if needed > written else f"more than {as_bytes(written)}"
        raise NoSpaceError(
            f"'{path}' could not be written ({os.strerror(number)}): it needs {most}, and "
            f"{as_bytes(free_bytes(path))} are free. Free some space, or choose a folder on another disk, and "
            "run again."
        ) from error


@contextmanager
def keeping(result: Callable[[], str]) -> Iterator[None]:
    """Add a result as text to the error if it cannot be written, so that it is shown instead of lost."""
    try:
        yield
    except OSError as error:
        error.add_note(result())
        raise


# ---- Files and folders -------------------------------------------------------------------------------------------

# Temporary names hold the machine and the process, because several processes may write to one folder.
_MACHINE = hashlib.blake2b(socket.gethostname().encode(), digest_size=3).hexdigest()
_LEFTOVER = re.compile(rf"\.unfinished-{_MACHINE}-(\d+)-.*|\..+\.{_MACHINE}-(\d+)\.partial")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders of processes of this machine that have died."""
    import psutil

    for path in folder.glob(".*"):
        found = _LEFTOVER.fullmatch(path.name)
        if found and not psutil.pid_exists(int(found[1] or found[2])):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@cache
def _sweep(folder: Path, process: int) -> None:
    """Remove leftovers once a process and folder: a folder of features may have many files."""
    remove_leftovers(folder)


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: str | Path, *, needed: int = 0) -> Iterator[Path]:
    """Yield a temporary path beside `path`; the finished file replaces `path` at the end, after it is on the disk.

    If the block raises, `path` is left as it was.

    Args:
        path: File to write.
        needed: Size of the file in bytes, if it is known; the error for a full disk has it.

    Raises:
        NoSpaceError: The disk is full.
    """
    path = Path(path)
    _sweep(path.parent, os.getpid())
    unfinished = path.with_name(f".{path.name}.{_MACHINE}-{os.getpid()}.partial")
    try:
        with explain_full_disk(path, unfinished, needed=needed):
            yield unfinished
            flush(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], notes: object) -> None:
    """Write tensors and notes, plain values for JSON, as one safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    check_space(Path(path).parent, num_bytes(tensors.values()))
    with whole_file(path, needed=num_bytes(tensors.values())) as unfinished:
        save_file(tensors, unfinished, metadata={"hf_regvit": json.dumps(notes)})


def read_notes(path: str | Path) -> Any:
    """Return the notes of a file that `write_tensors` wrote, without reading the tensors.

    Raises:
        SafetensorError: The file is not a safetensors file.
        KeyError: The file has no notes.
    """
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {})["hf_regvit"])


def apply_umask(folder: Path) -> None:
    """Give all files below a folder the permissions of new files; safetensors lets only their owner read them."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


@contextmanager
def whole_folder(output: str | Path, *, needed: int = 0) -> Iterator[Path]:
    """Yield a temporary folder inside `output`; its files are moved to `output` at the end, `config.json` last.

    Otherwise an interrupted run could leave a configuration without weights, which blocks the next run, or a model
    without its image processor, which would be used with the wrong statistics. An earlier result in `output` is
    replaced: its configuration is removed first, so that its files never form a model together with the new ones.

    Args:
        output: Folder to write to.
        needed: Size of the content in bytes, if it is known; it is checked before anything is written.

    Raises:
        NoSpaceError: The disk is full.
    """
    output = Path(output)
    check_space(output, needed)
    output.mkdir(parents=True, exist_ok=True)
    _sweep(output, os.getpid())
    with tempfile.TemporaryDirectory(dir=output, prefix=f".unfinished-{_MACHINE}-{os.getpid()}-") as name:
        staged = Path(name)
        with explain_full_disk(output, staged, needed=needed):
            yield staged
            apply_umask(staged)
            for path in staged.rglob("*"):
                flush(path)
        found = sorted(staged.iterdir(), key=lambda path: path.name == _LAST)
        if found and found[-1].name == _LAST:
            (output / _LAST).unlink(missing_ok=True)
            for old in set(output.glob("model*.safetensors*")) - {output / path.name for path in found}:
                old.unlink()  # weights in another number of files would be read instead of the new ones
        for path in found:
            path.replace(output / path.name)
        flush(output)
