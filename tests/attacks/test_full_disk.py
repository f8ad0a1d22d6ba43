"""Writers on a disk that fills up: one sentence with file and bytes, nothing unfinished left, no checkpoint lost."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.attacks

HERE = Path(__file__).parent
SIZES = (2**8, 2**10, 2**13, 2**15)
# Files cannot grow beyond a size, which any user may set; the errors are those of a full disk.
CODE = """
import json, os, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import kill_points
write, top = kill_points.WRITERS[sys.argv[2]], Path(sys.argv[3])
write(top / "unlimited") if sys.argv[2] == "conversion" else None  # its source is there before the disk is full
for size in map(int, sys.argv[4:]):
    if os.fork():
        os.wait()
        continue
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    said = ["done"]
    try:
        write(top / f"run-{size}")
    except Exception as error:
        said = [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]
    print("said" + json.dumps([size, said]), flush=True)
    os._exit(0)
"""


@pytest.mark.parametrize("writer", ["pretraining", "finetuning", "conversion"])
def test_a_full_disk_is_one_sentence(writer, tmp_path):
    command = [sys.executable, "-c", CODE, str(HERE), writer, str(tmp_path), *map(str, SIZES)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = dict(json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("said"))
    assert sorted(answers) == sorted(SIZES), done.stderr[-2000:]
    for size, said in answers.items():
        if said == ["done"]:
            continue
        if "The best checkpoint, of step" in said[0]:  # the result of fine-tuning is the best checkpoint
            assert re.search(r"it needs about [\d.]+ MiB, and [\d.,]+ MiB are free", said[0]), said
            assert "free disk space and run again" in said[0]
            continue
        assert said[0].startswith(f"NoSpaceError: '{tmp_path}"), (size, said)
        assert "could not be written (File too large): it needs" in said[0]
        if writer == "pretraining" and "report.json" in said[0]:
            assert "steps are done" in said[1]
            assert "resume_from_checkpoint=last" in said[1]
    assert sum(said != ["done"] for said in answers.values()) >= 2
    left = [path.name for path in tmp_path.rglob(".*") if "unfinished" in path.name or "partial" in path.name]
    assert left == []
