"""Writers that are killed at any point leave a whole result or none, and the next run repairs the rest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.attacks

HERE = Path(__file__).parent
# 45 points of pretraining, 6 of the slow export and 15 of every other writer: before the first change on the disk, the
# last, and between.
POINTS = {"pretraining": 45, "finetuning": 15, "conversion": 15, "publishing": 15, "exporting": 6, "replacing": 15}


@pytest.mark.parametrize("writer", POINTS)
def test_a_killed_writer_leaves_a_whole_result_or_none(writer, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, str(HERE / "kill_points.py"), writer, str(POINTS[writer]), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(results) == POINTS[writer]
    assert len({result["at"] for result in results}) == POINTS[writer]
    held = {"status": -9, "broken": [], "again": 0, "remains": []}
    assert [result for result in results if any(result[key] != value for key, value in held.items())] == []
