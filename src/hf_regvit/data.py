"""Training batches from images: the multi-crop data set, its sampler, block masks, and the collator.

Shape letters: B images, G global crops (2), L local crops, S and s side of a global and a local crop in pixels,
N patches of a global crop, M masked patches of the batch. Flattened crops are crop-major: crop 0 of all images first.

Every random draw is a pure function of (seed, epoch, sample id, view), so neither the number of workers nor a stop in
the middle of an epoch changes any pixel.
"""

import hashlib
import json
import logging
import math
import os
import random
import tarfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, count, islice, pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from .augmentation import MultiCrop, normalize_pixels
from .image_guard import BadImageError, ImageLimits, open_image, printable
from .images import ImageRecord, ImageSource, ImageStream, StreamRecord

logger = logging.getLogger(__name__)

# Last entries of seeds, which keep the random streams of different purposes independent.
_REPLACEMENTS, _WEIGHTED_PASS, _SHARD_ORDER, _SHUFFLE, _MIXTURE = 0xBAD, 1, 2, 3, 4
_REPLACEMENT_TRIES = 100
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


class _OneThreadOfOpenCV:
    """Base class of data sets for loader workers: disable OpenCV's thread pool, because a worker uses one core.

    The pool is disabled when the data set is created, before workers are forked from that process. In a forked worker
    it would be too late: shutting down a pool whose threads exist only in the parent never returns.
    """

    def __init__(self) -> None:
        import cv2

        cv2.setNumThreads(0)

    def __setstate__(self, state: dict[str, Any]) -> None:  # for a worker that is spawned, not forked
        _OneThreadOfOpenCV.__init__(self)
        self.__dict__.update(state)


class MultiCropDataset(_OneThreadOfOpenCV, Dataset[dict[str, Any]]):
    """Crops of the images of a source, indexed by `(epoch, index)` as `EpochSampler` yields them.

    Each item: `global_crops` (2, 3, S, S) and `local_crops` (L, 3, s, s) uint8, `sample_id` and `epoch` int.

    Args:
        source: Images.
        multi_crop: Augmentation.
        seed: Random seed of the run.
        cache_bytes: Memory for decoded images, in bytes per process. Images that do not fit are decoded again.
        bad_images: Record of images that cannot be used. Each is replaced by another one, drawn from (seed, epoch,
            index), with the crop parameters of the original. Default: the first bad image raises an error.
    """

    def __init__(
        self,
        source: ImageSource,
        multi_crop: MultiCrop,
        *,
        seed: int,
        cache_bytes: int = 256 * 2**20,
        bad_images: BadImages | None = None,
    ) -> None:
        super().__init__()
        self.source, self.multi_crop, self.seed, self.cache_bytes = source, multi_crop, seed, cache_bytes
        self.bad_images = bad_images
        if bad_images is not None:
            for problem in source.problems:
                bad_images.note(problem)
        self._cache: dict[int, Image.Image] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        if not isinstance(key, tuple):
            raise TypeError(f"MultiCropDataset[{key!r}]: expected (epoch, index). Use EpochSampler as the sampler.")
        epoch, index = key
        crops = self.multi_crop(self._usable_image(epoch, index), seed=self.seed, epoch=epoch, sample_id=index)
        return {**crops, "sample_id": index, "epoch": epoch}

    def _usable_image(self, epoch: int, index: int) -> Image.Image:
        """Return image `index` or, if it is bad, the first good one of a sequence set by (seed, epoch, index)."""
        if self.bad_images is None:
            return self._image(index)
        others = np.random.default_rng([self.seed, epoch, index, _REPLACEMENTS])
        for _ in range(_REPLACEMENT_TRIES):
            try:
                image = self._image(index)
            except BadImageError as error:
                self.bad_images.bad(error, epoch=epoch, index=index)
                index = int(others.integers(len(self)))
            else:
                self.bad_images.good(index)
                return image
        raise TooManyBadImagesError(
            f"{_REPLACEMENT_TRIES} randomly drawn images of '{self.source.name}' in a row cannot be used. "
            "Inspect the data with `regvit data-check`."
        )

    def _image(self, index: int) -> Image.Image:
        image = self._cache.get(index)
        if image is None:
            image = self.source[index].image
            size = 4 * image.width * image.height  # Pillow stores RGB in four bytes
            if self._cached_bytes + size <= self.cache_bytes:
                self._cache[index] = image
                self._cached_bytes += size
        return image


class EpochSampler(Sampler[tuple[int, int]]):
    """Yield `(epoch, index)` in an order that depends only on the seed and the epoch.

    The order is global, and each process takes its portion of it. So the images of a step are the same for any number
    of processes, and a position in the order is all that is needed to resume a run.

    Args:
        num_samples: Number of images in the data set.
        seed: Random seed of the run.
        images_per_step: Number of images per optimizer step over all processes; an epoch is cut to a multiple of it.
        parts: Sizes of the sources that were joined, in order; `ImageSource.parts`.
        weights: Relative share of every epoch for each source, in any unit. Each source is then iterated in passes of
            its own, which may end anywhere in an epoch; the first number of a key counts these passes, so every key
            is unique. Default: every image once per epoch.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        seed: int,
        images_per_step: int = 1,
        parts: Sequence[int] = (),
        weights: Sequence[float] | None = None,
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1.")
        if not 1 <= images_per_step <= num_samples:
            raise ValueError(
                f"images_per_step={images_per_step} must be between 1 and the number of images, {num_samples}."
            )
        self.num_samples, self.seed, self.epoch = num_samples, seed, 0
        self.images_per_step = images_per_step
        self.start, self.skip = (0, 0), 0
        self.parts = tuple(parts) or (num_samples,)
        if sum(self.parts) != num_samples:
            raise ValueError(f"parts={self.parts} must add up to num_samples={num_samples}.")
        self.draws = None
        if weights is not None:
            shares = checked_weights(weights, len(self.parts))
            ends = np.rint(np.cumsum(shares) * num_samples).astype(np.int64)
            self.draws = np.diff(ends, prepend=0)  # images of each source in an epoch; together num_samples

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; Trainer and accelerate call this."""
        self.epoch = epoch

    def start_at(self, epoch: int, offset: int, *, skip: int = 0) -> None:
        """Leave out the first `offset` images when `epoch` is iterated; other epochs are complete.

        Steps are counted from the offset. `skip` leaves out the first images of the first of these steps.
        """
        self.start, self.skip = (epoch, offset), skip

    def position(self, steps: int) -> tuple[int, int]:
        """Return the epoch, and the offset in images, `steps` optimizer steps after the position of `start_at`."""
        epoch, offset = self.start
        left = (self.num_samples - offset) // self.images_per_step
        if steps < left:
            return epoch, offset + steps * self.images_per_step
        per_epoch = self.num_samples // self.images_per_step
        epochs, rest = divmod(steps - left, per_epoch)
        return epoch + 1 + epochs, rest * self.images_per_step

    def __len__(self) -> int:
        return self.num_samples // self.images_per_step * self.images_per_step

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        offset = self.start[1] if epoch == self.start[0] else 0
        stop = offset + (self.num_samples - offset) // self.images_per_step * self.images_per_step
        skip = self.skip if epoch == self.start[0] else 0
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)[offset + skip : stop]
        if self.draws is None:
            for index in order:
                yield epoch, int(index)
        else:
            passes, indices = self._weighted_draws(epoch)
            for place in order:
                yield int(passes[place]), int(indices[place])

    def _weighted_draws(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return pass and index of each image of an epoch, (num_samples,) each, source by source."""
        passes, indices = [], []
        starts = [0, *accumulate(self.parts)]
        for part, (size, draws) in enumerate(zip(self.parts, cast(np.ndarray, self.draws))):
            # The epoch is a window of an endless sequence of passes over this source.
            pass_of, place = np.divmod(np.arange(epoch * draws, (epoch + 1) * draws), size)
            drawn = np.empty(len(place), dtype=np.int64)
            for number in np.unique(pass_of):
                order = np.random.default_rng([self.seed, part, int(number), _WEIGHTED_PASS]).permutation(size)
                drawn[pass_of == number] = order[place[pass_of == number]]
            passes.append(pass_of)
            indices.append(starts[part] + drawn)
        return np.concatenate(passes), np.concatenate(indices)


def checked_weights(weights: Sequence[float], num_sources: int) -> np.ndarray:
    """Return the weights of sources as shares that add up to one.

    Raises:
        ValueError: `weights` is not one positive number for each source.
    """
    values = np.asarray(weights, dtype=np.float64)
    if values.shape != (num_sources,) or not np.isfinite(values).all() or (values <= 0).any():
        raise ValueError(
            f"data_weights={list(weights)}: expected one positive number for each of the {num_sources} sources."
        )
    return values / math.fsum(values)  # exact, so that a tie in the number of images per source is the same everywhere


# --- Streams


class StreamSampler(Sampler[tuple[int, StreamRecord]]):
    """Yield `(pass, record)` from streams without end. The main process reads the records, and workers decode them.

    The order therefore does not depend on the number of workers. Every pass permutes the shards of a stream,
    distributes them over the processes (row by row if their number is not a multiple of the number of processes, as
    `datasets.distributed.split_dataset_by_node` does), and shuffles through a buffer, which is emptied at the end of
    the pass: each image is read exactly once per pass, by one process. A process that finishes a pass starts its next
    one, so every process has as many batches as are requested.

    If a shard cannot be read to its end, the rest of it is skipped, the problem is recorded, and the next shard
    follows. A lost connection is an error, because skipping images would change the order.

    Resuming is exact with any number of workers: `start_at` reads again from the beginning without decoding, and then
    the images are those of the uninterrupted run. It is not exact with another number of processes, or if shards were
    added, removed, renamed or changed; then images of the current pass may be repeated or missing.

    Args:
        streams: Streams to read; without weights, they are read one after another.
        seed: Random seed of the run.
        weights: Probability of each stream, in any unit; each stream then has passes of its own.
        rank: Index of this process.
        world_size: Number of processes.
        buffer_size: Number of records in the shuffle buffer, in memory as stored.
        bad_images: Record for shards that cannot be read.
    """

    def __init__(
        self,
        streams: Sequence[ImageStream],
        *,
        seed: int,
        weights: Sequence[float] | None = None,
        rank: int = 0,
        world_size: int = 1,
        buffer_size: int = 1000,
        bad_images: BadImages | None = None,
    ) -> None:
        if not 0 <= rank < world_size or buffer_size < 1:
            raise ValueError(
                f"rank={rank} must be below world_size={world_size}, and buffer_size={buffer_size} at least 1."
            )
        self.weights = None if weights is None else checked_weights(weights, len(streams))
        self.streams = [_join_streams(streams)] if weights is None else list(streams)
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.buffer_size, self.bad_images = buffer_size, bad_images
        self.skip = 0

    def start_at(self, num_images: int) -> None:
        """Leave out the first `num_images` images of this process."""
        self.skip = num_images

    def __iter__(self) -> Iterator[tuple[int, StreamRecord]]:
        endless = [self._passes(number, stream) for number, stream in enumerate(self.streams)]
        rng = np.random.default_rng([self.seed, self.rank, _MIXTURE])
        for number in count():
            stream = 0 if self.weights is None else int(rng.choice(len(endless), p=self.weights))
            key = next(endless[stream])
            if number >= self.skip:
                yield key

    def _passes(self, number: int, stream: ImageStream) -> Iterator[tuple[int, StreamRecord]]:
        for epoch in count():
            is_empty = True
            for record in self._shuffled(number, stream, epoch):
                is_empty = False
                yield epoch, record
            if is_empty:
                raise ValueError(
                    f"No image could be read from '{stream.name}' in process {self.rank}. Check that its shards exist "
                    "and hold images."
                )

    def _shuffled(self, number: int, stream: ImageStream, epoch: int) -> Iterator[StreamRecord]:
        rng = np.random.default_rng([self.seed, number, epoch, self.rank, _SHUFFLE])
        buffer: list[StreamRecord] = []
        for record in self._share(number, stream, epoch):
            if len(buffer) < self.buffer_size:
                buffer.append(record)
            else:
                place = int(rng.integers(self.buffer_size))
                yield buffer[place]
                buffer[place] = record
        for place in rng.permutation(len(buffer)):
            yield buffer[place]

    def _share(self, number: int, stream: ImageStream, epoch: int) -> Iterator[StreamRecord]:
        """Yield the records of one pass that belong to this process, in the order of its shards."""
        rng = np.random.default_rng([self.seed, number, epoch, _SHARD_ORDER])
        order = rng.permutation(stream.num_shards)  # the same in all processes
        if stream.num_shards % self.world_size == 0:
            for shard in order[self.rank :: self.world_size]:
                yield from self._rows(stream, int(shard))
        else:
            rows = (record for shard in order for record in self._rows(stream, int(shard)))
            yield from islice(rows, self.rank, None, self.world_size)

    def _rows(self, stream: ImageStream, shard: int) -> Iterator[StreamRecord]:
        try:
            yield from stream.open_shard(shard)
        except ConnectionError:
            raise
        except (OSError, ValueError, EOFError, tarfile.TarError) as error:
            reason = f"the rest of the shard cannot be read: {type(error).__name__}: {error}"
            problem = BadImageError(f"{stream.name}, shard {shard}", reason, "archive")
            logger.warning("%s", problem)
            if self.bad_images is not None:
                self.bad_images.note(problem)


def _join_streams(streams: Sequence[ImageStream]) -> ImageStream:
    if len(streams) == 1:
        return streams[0]
    starts = [0, *accumulate(stream.num_shards for stream in streams)]
    return ImageStream(
        name=" + ".join(stream.name for stream in streams),
        num_shards=starts[-1],
        open_shard=partial(_open_joined_shard, [stream.open_shard for stream in streams], starts[:-1]),
    )


def _open_joined_shard(
    opens: Sequence[Callable[[int], Iterator[StreamRecord]]], starts: Sequence[int], shard: int
) -> Iterator[StreamRecord]:
    part = bisect_right(starts, shard) - 1
    return opens[part](shard - starts[part])


def stream_sample_id(id: str) -> int:
    """Return the number of a stream's image for all random draws: 63 bits of a hash of its id."""
    return int.from_bytes(hashlib.blake2b(id.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big") >> 1


class MultiCropStream(_OneThreadOfOpenCV, Dataset[dict[str, Any]]):
    """Crops of the images of streams, indexed by the keys of a `StreamSampler`; items as in `MultiCropDataset`.

    An image that cannot be used is replaced by another one of the same batch, drawn from (seed, pass, id), with the
    crop parameters of the original, so the batch size stays the same.

    Args:
        streams: Images.
        multi_crop: Augmentation.
        seed: Random seed of the run.
        weights: Probability of each stream. Default: the streams are read one after another.
        limits: Limits that images must satisfy.
        bad_images: Record of images that do not. Default: the first bad image raises an error.
    """

    def __init__(
        self,
        streams: Sequence[ImageStream],
        multi_crop: MultiCrop,
        *,
        seed: int,
        weights: Sequence[float] | None = None,
        limits: ImageLimits | None = None,
        bad_images: BadImages | None = None,
    ) -> None:
        super().__init__()
        self.streams, self.multi_crop, self.seed, self.weights = list(streams), multi_crop, seed, weights
        self.limits, self.bad_images = limits or ImageLimits(), bad_images

    def sampler(self, *, rank: int = 0, world_size: int = 1) -> StreamSampler:
        """Create the sampler that reads the streams for one process, and log how a run can be resumed."""
        if rank == 0:
            logger.info(
                "Streaming %d shards of %s. A resumed run reads them again from the beginning to the position where "
                "it stopped, without decoding, and then has exactly the images of the uninterrupted run, for any "
                "number of workers. This does not hold for another number of processes or if shards have changed.",
                sum(stream.num_shards for stream in self.streams),
                ", ".join(stream.name for stream in self.streams),
            )
        return StreamSampler(
            self.streams,
            seed=self.seed,
            weights=self.weights,
            rank=rank,
            world_size=world_size,
            bad_images=self.bad_images,
        )

    def first_records(self, wanted: int, *, shards: int = 8) -> Iterator[ImageRecord]:
        """Yield the images to show during a run: the first good ones of evenly spaced shards, always the same.

        Args:
            wanted: Largest number of images; there are fewer if many of the first records cannot be used.
            shards: Largest number of shards to open.
        """
        reader = StreamSampler(self.streams, seed=self.seed)
        joined = reader.streams[0]
        opened = min(shards, joined.num_shards, wanted)
        found = 0
        for number in range(opened):
            share = -(-(wanted - found) // (opened - number))
            rows = islice(reader._rows(joined, number * joined.num_shards // opened), 4 * share)
            read = ((self._image(row), row) for row in rows)
            good = (ImageRecord(image, row.label, row.id) for image, row in read if isinstance(image, Image.Image))
            for record in islice(good, share):
                found += 1
                yield record

    def __getitem__(self, key: tuple[int, StreamRecord]) -> dict[str, Any]:
        if not isinstance(key, tuple) or not isinstance(key[1], StreamRecord):
            raise TypeError(
                f"MultiCropStream[{key!r}]: expected (pass, StreamRecord), because a stream has no image indices. Use "
                "its sampler()."
            )
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, StreamRecord]]) -> list[dict[str, Any]]:
        """Return the items of one batch; `DataLoader` calls this."""
        images = [self._open(*key) for key in keys]
        good = [image for image in images if image is not None]
        items = []
        for (epoch, record), image in zip(keys, images, strict=True):
            sample_id = stream_sample_id(record.id)
            if image is None:
                if not good:
                    raise TooManyBadImagesError(
                        f"None of the {len(keys)} images of a batch can be used; one of them is '{record.id}'. "
                        "Inspect the data with `regvit data-check`."
                    )
                rng = np.random.default_rng([self.seed, epoch, sample_id, _REPLACEMENTS])
                image = good[int(rng.integers(len(good)))]
            crops = self.multi_crop(image, seed=self.seed, epoch=epoch, sample_id=sample_id)
            items.append({**crops, "sample_id": sample_id, "epoch": epoch})
        return items

    def _open(self, epoch: int, record: StreamRecord) -> Image.Image | None:
        image = self._image(record)
        if isinstance(image, BadImageError):
            if self.bad_images is None:
                raise image
            self.bad_images.bad(image, epoch=epoch)
            return None
        if self.bad_images is not None and epoch == 0:
            self.bad_images.good()
        return image

    def _image(self, record: StreamRecord) -> Image.Image | BadImageError:
        if record.data is None:
            return BadImageError(record.id, "the cell is empty", "empty")
        try:
            return open_image(record.data, name=record.id, limits=self.limits)
        except BadImageError as error:
            return error


def block_mask(
    grid: tuple[int, int],
    num_masked: int,
    rng: random.Random,
    *,
    min_patches: int = 4,
    max_patches: int | None = None,
    min_aspect: float = 0.3,
) -> np.ndarray:
    """Mask a patch grid with random rectangles until `num_masked` patches are hidden, or slightly fewer.

    Args:
        grid: (rows, columns) of patches.
        num_masked: Number of patches to hide. The result never has more, and usually 0 to 2 fewer, because the search
            ends after ten failed tries.
        rng: Random number generator.
        min_patches: Smallest area drawn for a rectangle, in patches.
        max_patches: Largest number of patches that one rectangle may add. Default: half of the grid as dinov2
            computes it.
        min_aspect: Smallest height / width of a rectangle; the largest is its inverse.

    Returns:
        (rows, columns) bool, True = hidden from the student.

    Source: arXiv 2106.08254 (BEiT); dinov2 `data/masking.py` for the order of the draws.
    """
    rows, columns = grid
    max_patches = (rows // 2) * columns if max_patches is None else max_patches
    log_aspect = (math.log(min_aspect), math.log(1 / min_aspect))
    mask = np.zeros(grid, dtype=bool)
    count = 0
    while count < num_masked:
        cap = min(num_masked - count, max_patches)
        for _ in range(10):
            area = rng.uniform(min_patches, cap)
            aspect = math.exp(rng.uniform(*log_aspect))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= rows or width >= columns:
                continue
            top, left = rng.randint(0, rows - height), rng.randint(0, columns - width)
            block = mask[top : top + height, left : left + width]
            added = height * width - int(np.count_nonzero(block))
            if 0 < added <= cap:
                block[:] = True
                count += added
                break
        else:
            break
    return mask


def batch_masks(
    grid: tuple[int, int],
    num_crops: int,
    rng: random.Random,
    *,
    mask_ratio: Sequence[float] = (0.1, 0.5),
    mask_probability: float = 0.5,
) -> np.ndarray:
    """Draw the masks for all global crops of a batch, (num_crops, rows, columns) bool.

    `int(num_crops * mask_probability)` crops get a mask. The range of ratios is divided into as many equal intervals,
    one per masked crop, so the total over the batch hardly varies; then all masks are shuffled over the crops.

    Source: arXiv 2304.07193; dinov2 `data/collate.py` for the order of the draws.
    """
    num_masked_crops = int(num_crops * mask_probability)
    edges = np.linspace(mask_ratio[0], mask_ratio[1], num_masked_crops + 1).tolist()
    num_patches = grid[0] * grid[1]
    masks = [block_mask(grid, int(num_patches * rng.uniform(*strip)), rng) for strip in pairwise(edges)]
    masks += [np.zeros(grid, dtype=bool)] * (num_crops - num_masked_crops)
    rng.shuffle(masks)
    return np.stack(masks)


def masked_positions(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions and the loss weights of the masked patches.

    Args:
        masks: (..., N) bool, one row per crop.

    Returns:
        `mask_indices` (M,) int64 into the flattened masks, and `mask_weights` (M,) float32: one divided by the number
        of masked patches of the same crop, so that every masked crop has the same weight.
    """
    rows = masks.flatten(0, -2)  # (crops, N)
    weights = (1.0 / rows.sum(-1).clamp(min=1.0)).unsqueeze(-1).expand_as(rows)
    return rows.flatten().nonzero().flatten(), weights[rows]


@dataclass(frozen=True)
class DinoCollator:
    """Stack the items of `MultiCropDataset` crop-major and draw the masks of the global crops.

    Call it with a list of B items. The batch has `global_crops` (2, B, 3, S, S), `local_crops` (L, B, 3, s, s),
    `masks` (2, B, N) bool, `mask_indices` (M,) int64 into the flattened masks, `mask_weights` (M,) float32, and
    `sample_ids` and `epochs` (B,) int64, which the trainer removes before the forward pass. The masks depend only on
    the seed, the epoch and the ids of the items.

    Args:
        grid: (rows, columns) of patches of a global crop.
        mask_ratio: Smallest and largest share of patches hidden in a masked crop.
        mask_probability: Share of global crops that are masked.
        seed: Random seed of the run.
    """

    grid: tuple[int, int]
    mask_ratio: Sequence[float] = (0.1, 0.5)
    mask_probability: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.mask_ratio
        if not 0 <= low <= high <= 1 or not 0 <= self.mask_probability <= 1:
            raise ValueError(
                f"mask_ratio=({low}, {high}) must be ascending and within [0, 1], and mask_probability="
                f"{self.mask_probability} within [0, 1]."
            )

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate B items into one batch."""
        global_crops = _stack_crops(samples, "global_crops")  # (2, B, 3, S, S)
        local_crops = _stack_crops(samples, "local_crops")  # (L, B, 3, s, s)
        num_crops, batch_size = global_crops.shape[:2]
        entropy = [self.seed, samples[0]["epoch"], *(sample["sample_id"] for sample in samples)]
        rng = random.Random(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
        drawn = batch_masks(
            self.grid,
            num_crops * batch_size,
            rng,
            mask_ratio=self.mask_ratio,
            mask_probability=self.mask_probability,
        )
        masks = torch.from_numpy(drawn).view(num_crops, batch_size, -1)  # (2, B, N)
        mask_indices, mask_weights = masked_positions(masks)
        return {
            "global_crops": global_crops,
            "local_crops": local_crops,
            "masks": masks,
            "mask_indices": mask_indices,
            "mask_weights": mask_weights,
            # These two are not for the model; they identify the images if a step fails.
            "sample_ids": torch.tensor([sample["sample_id"] for sample in samples]),
            "epochs": torch.tensor([sample["epoch"] for sample in samples]),
        }


def _stack_crops(samples: Sequence[dict[str, Any]], name: str) -> Tensor:
    """Stack crop-major to (n, B, 3, H, W) float32; 8-bit crops are normalized here, once for the batch."""
    crops = torch.stack([sample[name] for sample in samples], dim=1)
    return normalize_pixels(crops) if crops.dtype == torch.uint8 else crops
