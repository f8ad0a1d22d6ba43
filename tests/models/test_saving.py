"""Results are whole or not there: full disks, leftovers of dead processes, and names of unfinished files."""

import errno
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

from hf_regvit.models.saving import (
    NoSpaceError,
    as_bytes,
    check_space,
    num_bytes,
    read_notes,
    whole_file,
    whole_folder,
    write_json,
    write_tensors,
)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["full", "full_in_safetensors"],
)
@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_a_full_disk_is_one_sentence_with_file_and_bytes(tmp_path, error, whole):
    target = tmp_path / "result"
    if whole is whole_file:
        target.write_text("before")
    with pytest.raises(NoSpaceError) as caught, whole(target, needed=3_400_000):
        raise error
    assert re.fullmatch(
        rf"'{target}' could not be written \(No space left on device\): it needs about 3\.2 MiB, and [\d,.]+ MiB are "
        r"free\. Free some space, or choose a folder on another disk, and run again\.",
        str(caught.value),
    )
    if whole is whole_file:
        assert target.read_text() == "before"
        assert {path.name for path in tmp_path.iterdir()} == {"result"}
    else:
        assert not {path.name for path in target.iterdir()}


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (PermissionError(errno.EACCES, "no"), SafetensorError("HeaderTooLarge"), RuntimeError("shape")):
        with pytest.raises(type(error)) as caught, whole_file(tmp_path / "a"):
            raise error
        assert caught.value is error


def test_space_is_looked_at_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    check_space(tmp_path / "not" / "there" / "yet", 2**20)
    with pytest.raises(NoSpaceError, match=r"needs about 1\.0 MiB, but only 1\.0 MiB are free"):
        check_space(tmp_path / "not" / "there" / "yet", 2**20 + 1)
    with pytest.raises(NoSpaceError, match="weights"), whole_folder(tmp_path / "weights", needed=2_000_000):
        pytest.fail("the work began")
    assert not {path.name for path in tmp_path.iterdir()}


def test_tensors_and_notes_come_back(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.zeros(2, dtype=torch.int8)}
    assert num_bytes(tensors.values()) == 6 * 4 + 2
    write_tensors(tmp_path / "a.safetensors", tensors, {"ids": ("x", "ü")})
    assert read_notes(tmp_path / "a.safetensors") == {"ids": ["x", "ü"]}
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors"}


@pytest.mark.slow
def test_a_dead_process_leaves_nothing_for_long(tmp_path):
    """A process is killed while it writes a file and a folder; the next one to write there cleans up."""
    program = (
        "import os, signal, sys\n"
        "from hf_regvit.models.saving import whole_file, whole_folder\n"
        "with whole_folder(sys.argv[1]) as folder, whole_file(sys.argv[1] + '/a.json') as file:\n"
        "    (folder / 'config.json').write_text('{}'); file.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    killed.wait(timeout=120)
    left = sorted({path.name for path in tmp_path.iterdir()})
    assert len(left) == 2
    assert all(re.search(rf"[0-9a-f]{{6}}-{killed.pid}\b", name) for name in left)
    machine = re.search(r"([0-9a-f]{6})-\d+", left[0])[1]
    kept = {
        f".b.json.{machine}-{os.getppid()}.partial",  # of a living process
        f".c.json.012345-{killed.pid}.partial",  # of another machine
        ".download.partial",  # of another program
        ".unfinished-business",
    }
    for name in kept:
        (tmp_path / name).write_text("")
    write_json(tmp_path / "a.json", {})
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", *kept}


def test_small_numbers_of_bytes_are_not_shown_as_zero():
    assert [as_bytes(count) for count in (0, 512, 2**20 - 1, 2**20, 5_000_000_000)] == [
        "0.0 KiB", "0.5 KiB", "1024.0 KiB", "1.0 MiB", "4,768.4 MiB"
    ]  # fmt: skip
