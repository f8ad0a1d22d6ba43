"""Manifest of a checkpoint: the checksum of each file, written last and verified first."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from .modeling_regvit import CheckpointCorruptError
from .saving import flush, read_json, write_json

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.pt"
STATE = "trainer_state.json"


class CheckpointIncompleteError(CheckpointCorruptError):
    """Intact checkpoint that was saved without a file that resuming needs."""


# ---- Folders -----------------------------------------------------------------------------------------------------


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def write_manifest(folder: Path) -> None:
    """Write `manifest.json` with size (bytes) and sha256 of every file below `folder`, and flush all of them."""
    files = {}
    for path in _files(folder):
        flush(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _digest(path)}
    write_json(folder / MANIFEST, {"format": 1, "files": files})
    for directory in {folder, *(path.parent for path in _files(folder))}:
        flush(directory)


def _listed(folder: Path) -> dict[str, tuple[int, str]]:
    """Return size and sha256 of every file that the manifest lists."""
    manifest = folder / MANIFEST
    try:
        return {
            name: (int(entry["size"]), str(entry["sha256"])) for name, entry in read_json(manifest)["files"].items()
        }
    except FileNotFoundError as error:
        raise CheckpointCorruptError(
            f"{manifest} is missing, so the checkpoint is incomplete or was not written by hf_regvit. Use another "
            "checkpoint."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointCorruptError(f"{manifest} cannot be read ({error}). Use another checkpoint.") from error


def check_weights(folder: Path) -> None:
    """Compare the weights with the manifest, if there is one: a flipped bit loads without an error.

    Raises:
        CheckpointCorruptError: The checksum of a weights file differs.
    """
    try:
        listed = _listed(folder)
    except CheckpointCorruptError:
        return  # no manifest, or a file of that name from another program
    for name, (_, expected) in listed.items():
        path = folder / name
        # Loading reports a missing file.
        if name.endswith(".safetensors") and path.is_file() and _digest(path) != expected:
            raise CheckpointCorruptError(
                f"The sha256 of '{path}' differs from '{folder / MANIFEST}'. Use an intact copy, or remove the "
                "manifest if you changed the weights on purpose."
            )


def verify_checkpoint(folder: Path, *, required: Sequence[str] = (WEIGHTS, OPTIMIZER, STATE)) -> None:
    """Compare every file of a checkpoint with its manifest.

    Args:
        folder: Checkpoint folder.
        required: Names of the files that must be present. A folder of the same stem with a number also counts, as in
            sharded state dicts (`optimizer_0` for `optimizer.pt`).

    Raises:
        CheckpointCorruptError: If a file is missing, has another size or other bytes, or the manifest cannot be read;
            the message names the file and the reason.
        CheckpointIncompleteError: If the checkpoint is intact, but was saved without a required file.
    """
    expected = _listed(folder)
    for name, (size, _) in expected.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointCorruptError(f"{path} is missing, but the manifest lists it with {size} bytes.")
        if path.stat().st_size != size:
            raise CheckpointCorruptError(f"{path} has {path.stat().st_size} bytes, but the manifest lists {size}.")
    for name, (_, digest) in expected.items():
        if _digest(folder / name) != digest:
            raise CheckpointCorruptError(f"{folder / name} has changed: its sha256 differs from the manifest.")
    for name in required:
        sharded = {WEIGHTS: "pytorch_model_fsdp_"}.get(name, f"{Path(name).stem}_")
        if name not in expected and not any(other.startswith(sharded) and "/" in other for other in expected):
            raise CheckpointIncompleteError(
                f"{folder} has no {name}, probably because it was saved with save_only_model. A run cannot be resumed "
                "without it. Use another checkpoint, or start a new run from its weights."
            )
