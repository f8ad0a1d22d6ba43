"""What several test files share: where the fixtures are, how they are read, how closely numbers must agree."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open


def shared_dir() -> Path | None:
    """The folder `shared` above the project, with golden files and data sets; None on a user's machine."""
    for parent in Path(__file__).resolve().parents:
        if (parent / "shared" / "golden" / "README.md").is_file():
            return parent / "shared"
    return None


# On a user's machine these tests skip. In CI a missing fixture is a failure, never a skip, unless CI says it has none.
_may_skip = not os.environ.get("CI") or bool(os.environ.get("REGVIT_WITHOUT_SHARED"))
requires_shared = pytest.mark.skipif(
    shared_dir() is None and _may_skip, reason="needs ../shared (golden files and data sets), not here"
)


def golden_files(group: str) -> list[str]:
    """Names of the golden safetensors files of one group, relative to `golden/`; empty without `shared`."""
    root = shared_dir()
    return (
        sorted(str(p.relative_to(root / "golden")) for p in (root / "golden" / group).rglob("*.safetensors"))
        if root
        else []
    )


def load_golden(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and the JSON `config` of one golden file, e.g. `dinov2/vit_reg4_mlp.safetensors`."""
    with safe_open(shared_dir() / "golden" / name, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["config"])  # noqa: SIM118


def subtree(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The entries under `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def assert_golden(actual: torch.Tensor, expected: torch.Tensor, *, atol: float = 2e-5, rtol: float = 1e-5) -> None:
    """The tolerance of the golden files unless a file states its own; decided once, never widened."""
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)
