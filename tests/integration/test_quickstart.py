"""Run `examples/quickstart.py` as a reader would: one command, no network, a figure at the end."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "quickstart.py"


@pytest.mark.slow
def test_quickstart_runs_offline(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "dense features  (1, 14, 21, 192)" in done.stdout
    assert "RegViTModel with 4 registers" in done.stdout
    figure = Path(re.search(r"figure\s+(\S+)", done.stdout)[1])
    assert figure.is_relative_to(tmp_path)
    assert Image.open(figure).width > 800
