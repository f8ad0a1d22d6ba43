"""Images in tar archives."""

import logging
import tarfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np

from .decoding import BadImageError, ImageLimits
from .files import _SUFFIXES, _Files, _is_compressed_tar
from .source import ImageSource, _RowNames, _stored_images

logger = logging.getLogger(__name__)


# --- Tar files in WebDataset format: members of one sample share their name up to the first dot


def _tar(found: _Files, *, limits: ImageLimits) -> ImageSource:
    ids: list[str] = []
    places: list[tuple[int, int, int]] = []
    classes: list[int | None] = []
    problems = list(found.problems)
    for shard, file in enumerate(found.files):
        members, labels, faults = _index_tar(file)
        called = file.relative_to(found.root).as_posix() if file != found.root else file.name
        for member, offset, size in members:
            ids.append(f"{called}#{member}")
            places.append((shard, offset, size))
            classes.append(labels.get(_sample_key(member)))
        problems += faults
    if not ids:
        listing = "; ".join(problem.reason for problem in problems[:3]) or "they hold only other types of files"
        raise ValueError(f"There are no images in the tar files of '{found.root}': {listing}.")
    for problem in problems:
        logger.warning("%s", problem)
    known = [label for label in classes if label is not None]
    labels_ = known if len(known) == len(classes) else None
    names = tuple(str(i) for i in range(max(known) + 1)) if labels_ is not None else None
    positions = np.array(places, dtype=np.int64)  # (images, 3): shard, first byte, number of bytes
    encoded = partial(_read_member, found.files, positions)
    name = str(found.root)
    return _stored_images(name, ids, encoded, _RowNames(name, ids), limits, labels_, names, problems=tuple(problems))


def _sample_key(member: str) -> str:
    folder, _, name = member.rpartition("/")
    return f"{folder}/{name.split('.')[0]}"


def _index_tar(file: Path) -> tuple[list[tuple[str, int, int]], dict[str, int], list[BadImageError]]:
    """Index one tar file: images as (name, first byte, number of bytes), class ids by sample, and problems.

    Nothing is unpacked. Links, devices and paths that lead outside the archive are left out, as is everything after a
    damaged header.
    """
    if _is_compressed_tar(file):
        raise ValueError(
            f"'{file}' is compressed, so its images cannot be read at random. Decompress it to .tar, or stream it."
        )
    images: list[tuple[str, int, int]] = []
    labels: dict[str, int] = {}
    problems: list[BadImageError] = []
    size = file.stat().st_size
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                name = member.name
                if member.isdir():
                    continue
                if not member.isreg() or name.startswith("/") or ".." in name.split("/"):
                    problems.append(BadImageError(f"{file}#{name}", "a link, or a path out of the archive", "blocked"))
                elif member.offset_data + member.size > size:
                    problems.append(BadImageError(f"{file}#{name}", "the archive ends inside this file", "archive"))
                elif Path(name).suffix.lower() in _SUFFIXES:
                    images.append((name, member.offset_data, member.size))
                elif name.endswith(".cls"):
                    content = archive.extractfile(member)
                    text = content.read(32).strip() if content else b""
                    if text.isdigit():
                        labels[_sample_key(name)] = int(text)
            end = archive.offset
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
        reason = f"the archive is damaged after {len(images)} images: {error}"
        return images, labels, [*problems, BadImageError(str(file), reason, "archive")]
    # `tarfile` treats any unreadable header except the first one as the end; a real end is a block of zeros.
    with file.open("rb") as stream:
        stream.seek(end)
        block = stream.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0") or not block:
        what = "the archive has a damaged header" if block else "the archive has no end marker (truncated?)"
        problems.append(BadImageError(str(file), f"{what} after {len(images)} images", "archive"))
    return images, labels, problems


def _read_member(files: list[Path], positions: np.ndarray, index: int) -> bytes:
    shard, offset, size = (int(value) for value in positions[index])
    try:
        with files[shard].open("rb") as stream:
            stream.seek(offset)
            data = stream.read(size)
    except OSError as error:
        raise BadImageError(str(files[shard]), f"{error.strerror or error}", "missing") from error
    if len(data) < size:
        raise BadImageError(str(files[shard]), f"the archive ends inside image {index}", "archive")
    return data
