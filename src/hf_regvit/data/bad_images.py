"""Count and record images that could not be read."""

import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from .decoding import BadImageError, printable

logger = logging.getLogger(__name__)
_FIRST_IMAGES = 1000


class TooManyBadImagesError(ValueError):
    """More images are unusable than `max_bad_share` allows; the message is the summary."""

    def __init__(self, message: str) -> None:
        # A DataLoader re-raises the error of a worker with the whole traceback as its message; only the end is kept.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class BadImages:
    """Count and record images that cannot be used, and stop the run when there are too many.

    Each bad image is recorded once, as one line of JSON with path, kind, reason and epoch. Every process and worker
    appends whole lines to the same file.

    Distinct bad images may be at most `max_bad_share` of the distinct images seen so far by this process and its
    workers (in a stream: by each worker). Until 1000 images have been seen, the share is computed of 1000, or of the
    whole data set if it is smaller, so that one bad image at the start does not stop the run. One bad image is always
    allowed, unless the share is 0.

    Args:
        path: File to append to. None counts without recording.
        max_bad_share: Largest share of bad images in [0, 1]. With 0, the first bad image is an error; with 1, the run
            never stops.
        num_images: Number of images in the data set; 0 if it is unknown (a stream).

    Raises:
        ValueError: The share is outside [0, 1].
    """

    def __init__(self, path: str | Path | None = None, *, max_bad_share: float = 0.01, num_images: int = 0) -> None:
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"max_bad_share={max_bad_share} must be between 0 and 1, as a share of the images.")
        self.path = None if path is None else Path(path)
        self.max_bad_share, self.num_images = max_bad_share, num_images
        # 0 not seen, 1 good, 2 bad; one byte per image, in memory shared between worker processes and their parent.
        self._states = torch.zeros(num_images, dtype=torch.uint8).share_memory_() if num_images else None
        self._good_in_stream, self._bad_in_stream = 0, set[str]()
        self._records: dict[str, dict[str, Any]] = {}
        self._read_up_to = 0

    def good(self, index: int | None = None) -> None:
        """Count image `index` as usable or, without an index, the next image of the first pass over a stream."""
        if self._states is None or index is None:
            self._good_in_stream += 1
        else:
            self._states[index] = 1

    def bad(self, error: BadImageError, *, epoch: int, index: int | None = None) -> None:
        """Count and record an image that cannot be used.

        Raises:
            TooManyBadImagesError: There are now too many bad images.
        """
        if self._states is None or index is None:
            self._record(error, epoch)
            self._bad_in_stream.add(error.path)
            bad = len(self._bad_in_stream)
            seen, total = self._good_in_stream + bad, _FIRST_IMAGES
        else:
            if self._states[index] == 2:
                return
            self._states[index] = 2
            self._record(error, epoch)
            seen, bad = int((self._states > 0).sum()), int((self._states == 2).sum())
            total = min(self.num_images, _FIRST_IMAGES)
        allowed = int(self.max_bad_share * max(seen, total))
        if bad > (max(allowed, 1) if self.max_bad_share else 0):
            raise TooManyBadImagesError(self._summary(seen, bad))

    def note(self, problem: BadImageError) -> None:
        """Record a problem that is not a single image, such as a damaged archive, without counting it."""
        self._record(problem, None)

    def _record(self, error: BadImageError, epoch: int | None) -> None:
        self._read_others()
        if error.path in self._records:
            return
        record = {"path": error.path, "kind": error.kind, "reason": error.reason, "epoch": epoch}
        if not self._records:
            logger.warning("%s It is skipped and recorded%s.", error, f" in '{self.path}'" if self.path else "")
        self._records[error.path] = record
        if self.path is None:
            return
        try:
            _append_line(self.path, json.dumps(record).encode())
        except OSError as write_error:  # such as a full disk
            logger.warning("'%s' cannot be written (%s), so '%s' is not recorded.", self.path, write_error, error.path)

    def _read_others(self) -> None:
        """Read the records that other processes have added since the last call."""
        if self.path is None or not self.path.is_file():
            return
        with self.path.open("rb") as stream:
            stream.seek(self._read_up_to)
            new = stream.read()
        whole = new.rpartition(b"\n")[0]
        self._read_up_to += len(whole) + 1 if whole else 0
        for line in whole.splitlines():
            try:
                record = json.loads(line)
                self._records.setdefault(record["path"], record)
            except (ValueError, KeyError, TypeError):  # an incomplete line, after a crash or on a full disk
                logger.debug("'%s' holds an invalid line: %r", self.path, line[:80])

    def _summary(self, seen: int, bad: int) -> str:
        self._read_others()
        kinds = Counter(record["kind"] for record in self._records.values()).most_common()
        first = list(self._records.values())[:3]
        examples = "; ".join(f"'{printable(record['path'])}': {record['reason']}" for record in first)
        listed = f" All are listed in '{self.path}'." if self.path else ""
        return (
            f"{bad} of the {seen} images seen so far cannot be used, more than max_bad_share={self.max_bad_share:g} "
            f"allows ({', '.join(f'{number} {kind}' for kind, number in kinds)}). Examples: {examples}.{listed} "
            "Inspect the data with `regvit data-check`, repair or remove these images, or increase --max_bad_share."
        )


def _append_line(path: Path, line: bytes) -> None:
    """Append one line with a single write, so that writes of other processes cannot interleave with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        # The last line may be incomplete if an earlier run was stopped while writing it.
        is_cut_off = False
        if os.lseek(file, 0, os.SEEK_END):
            os.lseek(file, -1, os.SEEK_END)
            is_cut_off = os.read(file, 1) != b"\n"
        os.write(file, b"\n" * is_cut_off + line + b"\n")
    finally:
        os.close(file)
