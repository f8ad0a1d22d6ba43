"""Plugin of pytest that compares the error of each comparison with its tolerance: `pytest --max-error-share 0.2`.

It prints the comparisons whose error is more than this share of their tolerance, and fails if there are any: another
processor or number of threads adds numbers in another order, and such a comparison might not hold there. A comparison
that must not hold, such as `not torch.allclose(...)`, needs the same distance on the other side. Where the error does
not come from rounding, as between a sample and its expectation, a comment `# tolerance: REASON` on the line of the
comparison, or on the line above, says so.

Recorded are `torch.testing.assert_close`, `torch.allclose`, `numpy.testing.assert_allclose`, `numpy.allclose`,
`math.isclose`, `pytest.approx` and assertions such as `assert error < 1e-5`.
"""

import functools
import linecache
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

TESTS = Path(__file__).parent
ApproxScalar = type(pytest.approx(1.0))  # which compares every number of a list, an array or a dictionary
REASON = "# tolerance: "
_SOURCE = re.compile(r"<=? (\d[\d.]*e-\d+)$")  # an assertion whose bound is written as 1e-5
_VALUE = re.compile(r"(-?\d[\d.]*(?:e[+-]?\d+)?)[^<>]* <=? ")  # `tensor(1.2e-07) < 1e-05`


def error_share(actual: Any, expected: Any, *, atol: float, rtol: float) -> float:
    """Return the largest |actual - expected| / (atol + rtol |expected|): 0 for equal values, infinity for a NaN."""
    actual, expected = np.broadcast_arrays(_array(actual), _array(expected))
    if "O" in (actual.dtype.kind, expected.dtype.kind):
        return 0.0
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.abs(actual - expected) / (atol + rtol * np.abs(expected))
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    return float(np.where(same, 0.0, np.nan_to_num(share, nan=math.inf, posinf=math.inf)).max(initial=0.0))


def _array(value: Any) -> np.ndarray:
    value = value.detach().cpu().to_dense() if isinstance(value, torch.Tensor) else torch.as_tensor(np.asarray(value))
    return (value if value.is_complex() else value.double()).numpy()


def _leaves(actual: Any, expected: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(expected, Mapping):
        for key in expected:
            yield from _leaves(actual[key], expected[key])
    elif isinstance(expected, Sequence):
        for one, other in zip(actual, expected):
            yield from _leaves(one, other)
    else:
        yield actual, expected


def _test_frames(frame: FrameType | None) -> list[FrameType]:
    """Return the frames of the tests, innermost first, if a test has called the comparison rather than the package."""
    frames: list[FrameType] = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if TESTS in path.parents and path != Path(__file__):
            frames.append(frame)
        elif not frames and "site-packages" not in path.parts and path != Path(__file__):
            return []
        frame = frame.f_back
    return [f for f in frames if f.f_code.co_filename != str(TESTS / "conftest.py")]


class ToleranceRecorder:
    """Wraps the functions that compare with a tolerance, and reports at the end of the session."""

    def __init__(self, config: pytest.Config, limit: float) -> None:
        self.config, self.limit = config, limit
        self.shares: dict[str, float] = {}  # of `path:line`; of an error above its tolerance the inverse
        self._originals: list[tuple[Any, str, Any]] = []
        for owner, name, share in (
            (torch.testing, "assert_close", _share_of_assert_close),
            (torch, "allclose", _share_of_allclose),
            (np.testing, "assert_allclose", _share_of_assert_allclose),
            (np, "allclose", _share_of_allclose),
            (math, "isclose", _share_of_isclose),
            (ApproxScalar, "__eq__", _share_of_approx),
        ):
            self._wrap(owner, name, share)

    def _wrap(self, owner: Any, name: str, share: Callable[..., float]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if frames := _test_frames(sys._getframe(1)):
                result = original(*args, **kwargs)  # first, because it explains wrong shapes and types
                self.record(share(*args, **kwargs), [(f.f_code.co_filename, f.f_lineno) for f in frames])
                return result
            return original(*args, **kwargs)

        self._originals.append((owner, name, original))
        setattr(owner, name, wrapped)

    def record(self, share: float, places: list[tuple[str, int]]) -> None:
        """Keep a share under the outermost of its places unless one of them has a reason."""
        lines = (linecache.getline(path, number) for path, line in places for number in (line, line - 1))
        if not any(REASON in line for line in lines):
            path, line = places[-1]
            key = f"{Path(path).relative_to(TESTS.parent)}:{line}"
            closeness = 1 / share if share > 1 else share
            self.shares[key] = max(self.shares.get(key, 0.0), closeness)

    def pytest_assertion_pass(self, item: pytest.Item, lineno: int, orig: str, expl: str) -> None:
        bound, value = _SOURCE.search(orig), _VALUE.search(expl.splitlines()[0])
        if bound and value:
            self.record(abs(float(value[1])) / float(bound[1]), [(str(item.path), lineno)])

    def pytest_testnodedown(self, node: Any) -> None:
        for key, share in getattr(node, "workeroutput", {}).get("error_shares", {}).items():  # a crash leaves nothing
            self.shares[key] = max(self.shares.get(key, 0.0), share)

    @property
    def too_large(self) -> list[str]:
        """Lines of the report, the largest share first."""
        found = sorted(((s, key) for key, s in self.shares.items() if s > self.limit), reverse=True)
        return [f"{share:6.3f}  {key}" for share, key in found]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["error_shares"] = self.shares
        elif self.too_large and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_unconfigure(self) -> None:
        for owner, name, original in reversed(self._originals):
            setattr(owner, name, original)
        if not hasattr(self.config, "workeroutput"):  # after the list of skipped tests, which would hide it
            lines = self.too_large
            print(
                f"{len(self.shares)} comparisons; {len(lines)} errors above {self.limit:g} of the tolerance",
                *lines,
                sep="\n",
            )


def _share_of_assert_close(actual: Any, expected: Any, *, atol: Any = None, rtol: Any = None, **_: Any) -> float:
    shares = [0.0]
    for one, other in _leaves(actual, expected):
        tensors = [torch.as_tensor(one), torch.as_tensor(other)]
        tolerances = torch.testing._comparison.get_tolerances(*tensors, rtol=rtol, atol=atol)
        shares.append(error_share(*tensors, rtol=tolerances[0], atol=tolerances[1]))
    return max(shares)


def _share_of_allclose(actual: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-8, **_: Any) -> float:
    return error_share(actual, expected, rtol=rtol, atol=atol)


def _share_of_assert_allclose(actual: Any, desired: Any, rtol: float = 1e-7, atol: float = 0, **_: Any) -> float:
    return error_share(actual, desired, rtol=rtol, atol=atol)


def _share_of_isclose(a: float, b: float, *, rel_tol: float = 1e-9, abs_tol: float = 0.0) -> float:
    return error_share(a, b, rtol=0, atol=max(rel_tol * max(abs(a), abs(b)), abs_tol))


def _share_of_approx(approx: Any, actual: Any) -> float:
    numbers = (int, float, np.number, torch.Tensor)
    if not all(isinstance(value, numbers) for value in (approx.expected, actual)) or not math.isfinite(
        approx.expected
    ):
        return 0.0
    return error_share(actual, approx.expected, rtol=0, atol=approx.tolerance)
