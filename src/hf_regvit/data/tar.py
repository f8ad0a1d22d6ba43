"""Images in tar archives in WebDataset format: the members of one sample share their name up to the first dot."""

import logging
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath

import numpy as np

from .decoding import BadImageError, lfs_pointer
from .files import Found, image_suffixes, is_hidden
from .labels import (
    LABEL_SUFFIXES,
    MOST_LABEL,
    add_label,
    classes_by_folder,
    label_of,
    note_on_names,
    number_classes,
    sample_key,
)
from .source import ImageSource, Reading, row_name, stored_image
from .tables import ImageStream, StreamRecord

logger = logging.getLogger(__name__)

_SAMPLE = 64  # images kept while their label may follow; more are no sample, but names like `2024.01.05_17.jpg`


def tar_source(found: Found, reading: Reading) -> ImageSource:
    """Open tar files for random access, by an index of byte positions."""
    ids: list[str] = []
    places: list[tuple[int, int, int]] = []
    classes: list[int | str | None] = []
    paths: list[tuple[str, ...]] = []
    problems = list(found.problems)
    for shard, file in enumerate(found.files):
        members, labels, faults = _index_tar(file, reading)
        called = _shard_name(found, file)
        for member, offset, size in members:
            ids.append(f"{called}#{member}")
            places.append((shard, offset, size))
            classes.append(label_of(member, labels))
            paths.append(PurePosixPath(member).parts)
        problems += faults
    if not ids:
        listing = "; ".join(problem.reason for problem in problems[:3]) or "they hold only other types of files"
        raise ValueError(f"There are no images in the tar files of '{found.root}': {listing}.")
    for problem in problems:
        logger.warning("%s", problem)
    notes = list(found.notes)
    folders = classes_by_folder(paths, [None] * len(paths))
    if set(classes) == {None} and len(set(folders)) > 1 and None not in folders:  # an archive of class folders
        classes = list(folders)
        notes += note_on_names(str(found.root), [path[0] for path in paths])
    elif None in classes and set(classes) != {None}:
        without = sum(one is None for one in classes)
        notes.append(f"'{found.root}': {without} of {len(ids)} images have no class, so none is used.")
    labels_, names = number_classes(classes)
    positions = np.array(places, dtype=np.int64)
    encoded, name = partial(_read_member, found.files, positions), str(found.root)
    read = partial(stored_image, encoded, partial(row_name, name, ids), reading.limits)
    return ImageSource(name, ids, read, labels_, names, encoded=encoded, problems=tuple(problems), notes=tuple(notes))


def _shard_name(found: Found, file: Path) -> str:
    return file.relative_to(found.root).as_posix() if file != found.root else file.name


def tar_texts(found: Found, ids: Sequence[str]) -> list[str | None]:
    """Return the content of the `.txt` member of the sample of each image; `ids` are those of `tar_source`.

    A damaged archive is read up to the damage, which `tar_source` reports.
    """
    texts: dict[tuple[str, str], str] = {}
    for file in found.files:
        with suppress(tarfile.TarError, OSError, EOFError), tarfile.open(file, "r:") as archive:
            for member in archive:
                if member.name.endswith(".txt") and _is_safe(member) and (content := archive.extractfile(member)):
                    text = content.read(MOST_LABEL).decode("utf-8", "replace")
                    texts[_shard_name(found, file), sample_key(member.name)] = text
    return [texts.get((shard, sample_key(member))) for shard, _, member in (id.partition("#") for id in ids)]


def _is_safe(member: tarfile.TarInfo) -> bool:
    return member.isreg() and not member.name.startswith("/") and ".." not in member.name.split("/")


def _is_image(name: str, image_column: str | None) -> bool:
    suffix = PurePosixPath(name).suffix.lower()
    return suffix in image_suffixes() and image_column in (None, suffix[1:], name.partition(".")[2].lower())


def stream_tar(name: str, files: Sequence[Path], reading: Reading) -> ImageStream:
    """Open tar files for sequential reading, compressed ones too; each shard may hold other types of images.

    Raises:
        ValueError: There is no image in any shard.
    """
    stream = ImageStream(name, len(files), partial(_stream_samples, files, reading))
    if not any(next(stream.open_shard(shard), None) for shard in range(len(files))):
        column = f" of type '{reading.image_column}' (image_column)" if reading.image_column else ""
        raise ValueError(f"'{name}' cannot be streamed: there are no images{column} in its {len(files)} tar files.")
    return stream


def _stream_samples(files: Sequence[Path], reading: Reading, shard: int) -> Iterator[StreamRecord]:
    with tarfile.open(files[shard], "r|*") as archive:
        members = (member for member in archive if _is_safe(member) and not is_hidden(member.name))
        for _, sample in groupby(members, key=lambda member: sample_key(member.name)):
            labels: dict[str, int | str] = {}
            images: list[tuple[str, bytes]] = []
            for member in sample:
                content = archive.extractfile(member)
                if content is not None and _is_image(member.name, reading.image_column):
                    images.append((member.name, content.read()))
                elif content is not None and member.name.endswith(LABEL_SUFFIXES):
                    add_label(labels, member.name, content.read(MOST_LABEL), reading.label_column)
                if len(images) > _SAMPLE:
                    yield from _records(files[shard].name, images, labels)
                    images.clear()
            yield from _records(files[shard].name, images, labels)


def _records(shard: str, images: Sequence[tuple[str, bytes]], labels: dict[str, int | str]) -> Iterator[StreamRecord]:
    for name, data in images:
        label = label_of(name, labels)
        number = label if isinstance(label, int) and label >= 0 else None  # names have no numbers in a stream
        yield StreamRecord(f"{shard}#{name}", data, number)


def _index_tar(
    file: Path, reading: Reading
) -> tuple[list[tuple[str, int, int]], dict[str, int | str], list[BadImageError]]:
    """Index one tar file: images as (name, first byte, number of bytes), classes by sample, and problems.

    Nothing is unpacked. Links, devices and paths that lead outside the archive are left out, as is everything after a
    damaged header.
    """
    if file.suffix.lower() != ".tar":
        raise ValueError(
            f"'{file}' is compressed, so its images cannot be read at random. Decompress it to .tar, or stream it."
        )
    images: list[tuple[str, int, int]] = []
    labels: dict[str, int | str] = {}
    problems: list[BadImageError] = []
    size = file.stat().st_size
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                name = member.name
                if member.isdir() or is_hidden(name):
                    continue
                if not _is_safe(member):
                    problems.append(BadImageError(f"{file}#{name}", "a link, or a path out of the archive", "blocked"))
                elif member.offset_data + member.size > size:
                    problems.append(BadImageError(f"{file}#{name}", "the archive ends inside this file", "archive"))
                elif _is_image(name, None):
                    images.append((name, member.offset_data, member.size))
                elif name.endswith(LABEL_SUFFIXES) and (content := archive.extractfile(member)):
                    add_label(labels, name, content.read(MOST_LABEL), reading.label_column)
            end = archive.offset
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
        reason = lfs_pointer(file) or f"the archive is damaged after {len(images)} images: {error}"
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
