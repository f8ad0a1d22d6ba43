"""Full disks: a limit on the size of files, which any user may set, and a real small file system, which needs root."""

import re
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SENTENCE = re.compile(
    r"'[^']+' (could not be written \([^)]+\): it needs (about|more than) [\d,.]+ [KM]iB, and [\d,.]+ [KM]iB are "
    r"free\. Free some space, or choose a folder on another disk, and run again"
    r"|needs about [\d,.]+ [KM]iB, but only [\d,.]+ [KM]iB are free\. "
    r"Free some space, or choose a folder on another disk)\."
)


@contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """Fail every write beyond a size in this process and the ones that it starts, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Mount a file system of some bytes in memory; skip the test where that is not permitted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no command 'mount'")
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def error_line(shown: str) -> str:
    """Return the error in the output of a command, which is one sentence with a file and bytes, and no traceback."""
    assert "Traceback" not in shown, shown
    (line,) = [line.removeprefix("error: ") for line in shown.splitlines() if line.startswith("error: ")]
    assert SENTENCE.fullmatch(line), line
    return line
