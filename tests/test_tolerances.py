"""The recorder of errors finds comparisons that hold by a small margin, of every kind that the tests use."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tolerances import error_share

# A comparison, and whether its margin is too small.
COMPARISONS = {
    "torch.testing.assert_close(torch.tensor(1.0), torch.tensor(1.5), atol=1, rtol=0)": True,
    "torch.testing.assert_close({'a': [torch.tensor(1.0)]}, {'a': [torch.tensor(1.5)]}, atol=3, rtol=0)": False,
    "np.testing.assert_allclose([1.0, 2.0], [1.0, 2.5], rtol=0.5)": True,
    "assert not torch.allclose(torch.tensor(1.0), torch.tensor(1.5), atol=0.25, rtol=0)": True,
    "assert not torch.allclose(torch.tensor(1.0), torch.tensor(1.5), atol=0.05, rtol=0)": False,
    "assert [1.0, {'a': 2.0}] == [1.0, {'a': pytest.approx(2.5, abs=1)}]": True,
    "assert 2.0 == pytest.approx(2.5, abs=1)  # tolerance: of a sample": False,
    "assert np.ones(3) == pytest.approx(np.full(3, 1.1), abs=1)": False,
    "assert math.isclose(1.0, 1.5, abs_tol=1)": True,
    "assert torch.tensor(5e-6).max() < 1e-5": True,
    "assert abs(-1e-6) <= 1e-5": False,
    "assert 0.5 < 1": False,
}


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_small_margins_are_printed_and_fail(tmp_path, workers):
    shutil.copy(Path(__file__).with_name("tolerances.py"), tmp_path)
    (tmp_path / "conftest.py").write_text(
        "from tolerances import ToleranceRecorder\n\n\ndef pytest_configure(config):\n"
        "    config.pluginmanager.register(ToleranceRecorder(config, 0.2))\n"
    )
    lines = ["import math", "import numpy as np", "import pytest", "import torch"]
    for number, comparison in enumerate(COMPARISONS):
        lines += [f"def test_{number}():", f"    {comparison}"]
    (tmp_path / "test_it.py").write_text("\n".join(lines) + "\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nenable_assertion_pass_hook = true\n")
    command = [sys.executable, "-m", "pytest", "-q", "-n", workers, "-p", "no:cacheprovider"]
    plain = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(command, cwd=tmp_path, env=plain, capture_output=True, text=True, check=False)
    assert f"{len(COMPARISONS)} passed" in done.stdout, done.stdout
    assert done.returncode == 1
    found = {
        lines[int(line.rpartition(":")[2]) - 1].strip() for line in done.stdout.splitlines() if "test_it.py:" in line
    }
    assert found == {comparison for comparison, small in COMPARISONS.items() if small}


def test_shares_are_of_the_element_that_is_worst():
    actual, expected = torch.tensor([1.0, 2.0, math.nan]), np.array([1.5, 2.0, math.nan])
    assert error_share(actual, expected, atol=0.25, rtol=0.5) == 0.5
    assert error_share(actual, expected, atol=0, rtol=0) == math.inf
    assert error_share(torch.tensor([math.nan]), 1.0, atol=1, rtol=1) == math.inf
    assert error_share(np.zeros((0, 3)), np.zeros((0, 3)), atol=0, rtol=0) == 0
