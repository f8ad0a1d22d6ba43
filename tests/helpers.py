"""Helpers shared by several test files: paths of the fixtures, their loading, and numerical tolerances."""

import importlib.util
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open


def shared_dir() -> Path | None:
    """Return the folder `shared` above the project, with golden files and data sets, or None if it does not exist."""
    for parent in Path(__file__).resolve().parents:
        if (parent / "shared" / "golden" / "README.md").is_file():
            return parent / "shared"
    return None


# Without fixtures these tests are skipped. In CI that is a failure, unless CI sets REGVIT_WITHOUT_SHARED.
_may_skip = not os.environ.get("CI") or bool(os.environ.get("REGVIT_WITHOUT_SHARED"))
requires_shared = pytest.mark.skipif(
    shared_dir() is None and _may_skip, reason="needs ../shared (golden files and data sets), which does not exist"
)


def slow_except(values: Iterable[Any], *fast: Any) -> list[Any]:
    """Return the parameters of a test that takes seconds, all slow but those that stand for the others."""
    values = list(values)
    assert all(value in values for value in fast)
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*row, marks=() if value in fast else pytest.mark.slow) for value, row in zip(values, rows)]


def load_script(path: str) -> ModuleType:
    """Import a Python file of the repository that is in no package, by its path below the root."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, Path(__file__).parents[1] / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def golden_files(group: str) -> list[str]:
    """Return the golden safetensors files of a group, relative to `golden/`; empty without `shared`."""
    root = shared_dir()
    return (
        sorted(str(p.relative_to(root / "golden")) for p in (root / "golden" / group).rglob("*.safetensors"))
        if root
        else []
    )


def load_golden(name: str, *, double: bool = False) -> tuple[dict[str, torch.Tensor], dict]:
    """Load the tensors and the JSON `config` of a golden file such as `dinov2/vit_reg4_mlp.safetensors`.

    `double` is for tests whose model is in double precision too: inputs become float64, and the error that remains is
    that of the file, which is the same on every processor.
    """
    with safe_open(shared_dir() / "golden" / name, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    if double:
        tensors |= {k: v.double() for k, v in tensors.items() if k.startswith("in.") and v.is_floating_point()}
    return tensors, config


def golden_json(name: str) -> Any:
    """Load a JSON file of `golden/train/`."""
    return json.loads((shared_dir() / "golden" / "train" / f"{name}.json").read_text())


def subtree(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return the entries whose names start with `prefix`, without the prefix."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def assert_golden(actual: torch.Tensor, expected: torch.Tensor, *, atol: float = 2e-5, rtol: float = 1e-5) -> None:
    """Compare tensors with the default tolerance of the golden files, which must not be increased."""
    if actual.dtype == torch.float64:
        # tolerance: for the rounding of the file, which is up to 0.3 of it on every processor
        torch.testing.assert_close(actual, expected.double(), atol=atol, rtol=rtol)
    else:
        torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


# Names of official DINOv2 weights and of RegViT: beginnings, then parts of blocks.
_BEGINNINGS = (
    ("cls_token", "embeddings.cls_token"),
    ("register_tokens", "embeddings.register_tokens"),
    ("mask_token", "embeddings.mask_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("norm.", "layernorm."),
    ("blocks.", "layers."),
)
_PARTS = {
    ".attn.proj.": ".attention.o_proj.", ".attn.qkv.": ".attention.qkv.", ".ls1.gamma": ".layer_scale1.lambda1",
    ".ls2.gamma": ".layer_scale2.lambda1", ".w12.": ".gate_up_proj.", ".w3.": ".down_proj.",
}  # fmt: skip


def regvit_name(official: str) -> str:
    """Return the name in RegViT of a tensor of the official DINOv2 backbone."""
    official = re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", official)  # chunked blocks keep their global number
    for old, new in _PARTS.items():
        official = official.replace(old, new)
    for old, new in _BEGINNINGS:
        if official.startswith(old):
            return new + official.removeprefix(old)
    raise KeyError(official)


def sizes_of(tensors: dict[str, torch.Tensor], prefix: str = "in.pixels.") -> list[str]:
    """Return the image sizes of a golden file, one or more."""
    sizes = sorted(key.removeprefix(prefix) for key in tensors if key.startswith(prefix))
    assert sizes
    return sizes
