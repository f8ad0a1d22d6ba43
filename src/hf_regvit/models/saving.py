"""Write results whole or not at all: JSON files, tensors, single files and folders, also on a disk that fills up."""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
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


# --- Space on the disk


class DiskFullError(OSError):
    """A result does not fit on its disk; the message names the file and the bytes that are needed."""


_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows has no EDQUOT


def size_of(tensors: Mapping[str, "Tensor"]) -> int:
    """Return the number of bytes of tensors, such as the state of a model."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def require_space(path: str | Path, num_bytes: int) -> None:
    """Raise a DiskFullError if a result of this size does not fit on the disk of `path`, which need not exist."""
    path = Path(path).absolute()
    if shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free < num_bytes:
        raise _disk_full(path, num_bytes, errno.ENOSPC)


def _disk_full(path: Path, num_bytes: int, code: int) -> DiskFullError:
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    needed, free = (f"{count / 1e6:,.1f} MB" for count in (num_bytes, shutil.disk_usage(there).free))
    error = DiskFullError(
        f"'{path}' cannot be written ({os.strerror(code)}): {needed} are needed, and {free} are free. Free some "
        "space, or choose another folder."
    )
    error.errno = code
    return error


@contextmanager
def _explaining_full_disks(path: Path, unfinished: Path, num_bytes: int) -> Iterator[None]:
    """Turn the errors of Python, safetensors and torch about a full disk into a DiskFullError."""
    try:
        yield
    except DiskFullError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        number = re.search(r"os error (\d+)", str(error))
        code = error.errno if isinstance(error, OSError) else int(number[1]) if number else None
        if isinstance(error, RuntimeError) and re.search("PytorchStreamWriter|inline_container", str(error)):
            code = errno.ENOSPC
        if code not in _FULL:
            raise
        written = sum(one.stat().st_size for one in (unfinished, *unfinished.rglob("*")) if one.is_file())
        raise _disk_full(path, max(num_bytes, written), code or errno.ENOSPC) from error


# --- Whole files and folders


def _mark() -> str:
    """Return a name of this process: machine and process namespace as a hash, and the process id."""
    namespace = ""
    with suppress(OSError):  # containers may share a host name, but not their process ids
        namespace = str(Path("/proc/self/ns/pid").readlink())
    machine = hashlib.blake2b(f"{socket.gethostname()} {namespace}".encode(), digest_size=4).hexdigest()
    return f"{machine}-{os.getpid()}"


@cache  # once for each folder of a process
def _remove_leftovers(folder: Path) -> None:
    """Remove what dead processes left unfinished in a folder; of other machines, what is older than a day."""
    for place in (*folder.glob(".*.partial"), *folder.glob(".unfinished-*")):
        found = re.search(r"\b([0-9a-f]{8})-(\d+)\b", place.name)
        if found is None:  # of another program
            continue
        with suppress(OSError):  # another process was faster
            if found[1] == _mark().partition("-")[0]:
                dead = not psutil.pid_exists(int(found[2]))
            else:
                dead = time.time() - place.stat().st_mtime > 24 * 3600
            if dead:
                shutil.rmtree(place) if place.is_dir() else place.unlink()


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: str | Path, *, num_bytes: int = 0) -> Iterator[Path]:
    """Yield a temporary path beside `path`; the finished file replaces `path` at the end, after it is on the disk.

    If the block raises, `path` is left as it was. The temporary name holds the process id, because several processes
    may write the same file, and what a dead process left is removed.

    Args:
        path: File to write.
        num_bytes: Size of the file, if it is known; it is compared with the free space before the block runs.

    Raises:
        DiskFullError: The file does not fit on the disk.
    """
    path = Path(path)
    _remove_leftovers(path.parent)
    unfinished = path.with_name(f".{path.name}.{_mark()}.partial")
    require_space(path, num_bytes)
    try:
        with _explaining_full_disks(path, unfinished, num_bytes):
            yield unfinished
            flush(unfinished)
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_tensors(path: str | Path, tensors: Mapping[str, "Tensor"], notes: object) -> None:
    """Write tensors and notes, plain values for JSON, as one safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with whole_file(path, num_bytes=size_of(tensors)) as unfinished:
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
def whole_folder(output: str | Path, *, num_bytes: int = 0) -> Iterator[Path]:
    """Yield a temporary folder inside `output`; its files are moved to `output` at the end, `config.json` last.

    Otherwise an interrupted run could leave a configuration without weights, which blocks the next run, or a model
    without its image processor, which would be used with the wrong statistics. An earlier result in `output` is
    replaced: its configuration is removed first, so that its files never form a model together with the new ones. What
    a dead process left is removed.

    Args:
        output: Output folder, created if needed.
        num_bytes: Size of the files, if it is known; it is compared with the free space before the block runs.

    Raises:
        DiskFullError: The files do not fit on the disk.
    """
    output = Path(output)
    require_space(output, num_bytes)
    output.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(output)
    with tempfile.TemporaryDirectory(dir=output, prefix=f".unfinished-{_mark()}-") as name:
        staged = Path(name)
        with _explaining_full_disks(output, staged, num_bytes):
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
