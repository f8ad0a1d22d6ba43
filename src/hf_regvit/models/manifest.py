"""Manifest of a checkpoint: the checksum of each file, written last and verified first."""

import hashlib
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from .configuration_regvit import CheckpointCorruptError
from .saving import flush, read_json, whole_folder, write_json

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.pt"
STATE = "trainer_state.json"
_SETTINGS = ("config.json", "preprocessor_config.json")


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


def check_archive(path: Path) -> None:
    """Raise a `CheckpointCorruptError` for a compressed file of torch, which could fill the memory when it is read."""
    if path.suffix != ".safetensors" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise CheckpointCorruptError(
                    f"'{path}' is compressed, which torch.save never does, so it was not read. Use another file."
                )


@contextmanager
def whole_checkpoint(output: str | Path, *, needed: int = 0) -> Iterator[Path]:
    """Yield a folder like `whole_folder`, and add a manifest of its files, so that loading notices later changes."""
    with whole_folder(output, needed=needed) as staged:
        yield staged
        write_manifest(staged)


def _listed(folder: Path) -> dict[str, tuple[int, str]]:
    """Return size and sha256 of every file that the manifest lists; a file outside of the folder is an error."""
    manifest = folder / MANIFEST
    try:
        files = read_json(manifest)["files"]
        if outside := [name for name in files if PurePosixPath(name).is_absolute() or ".." in name.split("/")]:
            raise ValueError(f"it names {outside[0]!r}, which is outside of the folder")
        return {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError as error:
        raise CheckpointCorruptError(
            f"{manifest} is missing, so the checkpoint is incomplete or was not written by hf_regvit. Use another "
            "checkpoint."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointCorruptError(f"{manifest} cannot be read ({error}). Use another checkpoint.") from error


def check_weights(folder: Path) -> None:
    """Compare weights, configuration and image processor with the manifest, if there is one.

    A flipped bit, or weights of another model, would load without an error.

    Raises:
        CheckpointCorruptError: The checksum of a file differs, or the manifest does not list a weights file.
    """
    try:
        listed = _listed(folder)
    except CheckpointCorruptError:
        return  # no manifest, or a file of that name from another program
    weights = {name for name in listed if name.endswith(".safetensors")}
    weights |= {path.name for path in folder.glob("model*.safetensors*")}
    for name in (*sorted(weights), *(name for name in _SETTINGS if name in listed)):
        path = folder / name
        if path.is_file() and _digest(path) != listed.get(name, (0, ""))[1]:  # loading reports a missing file
            raise CheckpointCorruptError(
                f"The sha256 of '{path}' differs from '{folder / MANIFEST}'. Use an intact copy, or remove the "
                "manifest if you changed the file on purpose."
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
        check_archive(folder / name)
    for name in required:
        sharded = {WEIGHTS: "pytorch_model_fsdp_"}.get(name, f"{Path(name).stem}_")
        if name not in expected and not any(other.startswith(sharded) and "/" in other for other in expected):
            raise CheckpointIncompleteError(
                f"{folder} has no {name}, probably because it was saved with save_only_model. A run cannot be resumed "
                "without it. Use another checkpoint, or start a new run from its weights."
            )
