"""Checkpoint folders of a run: list, verify, publish whole, rotate."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..models.manifest import MANIFEST, CheckpointIncompleteError, _flush, verify_checkpoint, write_manifest
from ..models.modeling_regvit import CheckpointCorruptError

logger = logging.getLogger(__name__)
STAGING = ".saving"  # folder inside the run folder in which a checkpoint is assembled
RESUME_STATE = "resume_state.json"


def list_checkpoints(run: Path) -> list[Path]:
    """Return the folders `checkpoint-N` of a run, sorted by N, without those renamed to `checkpoint-N.broken`."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    found = [p for p in run.glob(f"{prefix}*") if p.is_dir() and p.name.removeprefix(prefix).isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(prefix)))


def _check_is_checkpoint(folder: Path) -> None:
    """Raise an error if a folder does not exist or is a run folder, before it is verified as a checkpoint."""
    if not folder.is_dir():
        raise CheckpointCorruptError(
            f"The folder '{folder}' does not exist. Pass a checkpoint folder, or 'last' for the newest one in "
            "output_dir."
        )
    if not (folder / MANIFEST).exists() and (inside := list_checkpoints(folder)):
        raise CheckpointCorruptError(
            f"'{folder}' is a run folder, not a checkpoint. It holds {', '.join(path.name for path in inside[-3:])}. "
            "Pass one of them, or pass this folder as output_dir and 'last' as resume_from_checkpoint."
        )


def newest_checkpoint(run: Path) -> Path | None:
    """Return the newest valid checkpoint of a run, or None if there is none.

    Every newer checkpoint that fails verification is renamed to `checkpoint-N.broken` and logged. A checkpoint that
    was saved without its optimizer is skipped but not renamed.

    Raises:
        CheckpointIncompleteError: If there are only checkpoints that were saved without a file that resuming needs.
    """
    incomplete: CheckpointIncompleteError | None = None
    for folder in reversed(list_checkpoints(run)):
        try:
            verify_checkpoint(folder)
        except CheckpointIncompleteError as error:
            incomplete = incomplete or error
            logger.warning("%s Trying the previous checkpoint.", error)
        except CheckpointCorruptError as error:
            aside = folder.with_name(f"{folder.name}.broken")
            if aside.exists():
                shutil.rmtree(aside)
            folder.rename(aside)
            logger.warning("%s The folder was renamed to %s. Trying the previous checkpoint.", error, aside.name)
        else:
            return folder
    if incomplete is not None:
        raise incomplete
    return None


def publish_checkpoint(staged: Path, final: Path) -> None:
    """Move a finished folder to its final name in one step, and replace a folder that already has that name."""
    write_manifest(staged)
    old = staged.with_name(f"{final.name}.replaced")
    if final.exists():
        final.rename(old)
    staged.rename(final)
    _flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def rotate_checkpoints(run: Path, limit: int | None, *, keep: Sequence[Path] = ()) -> None:
    """Delete the oldest checkpoints until `limit` are left.

    Args:
        run: Run folder.
        limit: Number of checkpoints to keep, at least 1; None or 0 keeps all.
        keep: Folders that are never deleted, such as the newest and the best one.
    """
    if not limit:
        return
    folders = list_checkpoints(run)
    kept = {path.resolve() for path in keep}
    for folder in folders[: max(len(folders) - limit, 0)]:
        if folder.resolve() not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def _is_write_error(error: BaseException) -> bool:
    """Return True if saving failed because of the disk instead of a bug."""
    if isinstance(error, OSError | SafetensorError):
        return True
    # torch.save and the sharded writer report a full disk with their own error types.
    return isinstance(error, CheckpointException) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("inline_container", "file write"))
    )
