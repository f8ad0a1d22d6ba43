"""Samplers that draw by (seed, epoch, sample), so that a resumed run draws the same images."""

import copy
import hashlib
import logging
import math
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, count, islice
from typing import TypeVar

import numpy as np
from torch.utils.data import Sampler

from ..data.bad_images import BadImages, TooManyBadImagesError
from ..data.decoding import BadImageError
from ..data.tables import ImageStream, StreamRecord

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Last entries of seeds, which keep the random streams of different purposes independent.
REPLACEMENTS, _WEIGHTED_PASS, _SHARD_ORDER, _SHUFFLE, _MIXTURE = 0xBAD, 1, 2, 3, 4
_REPLACEMENT_TRIES = 100


class EpochSampler(Sampler[tuple[int, ...]]):
    """Yield `(epoch, index)` in an order that depends only on the seed and the epoch.

    The order is global, and each process takes its portion of it. So the images of a step are the same for any number
    of processes, and a position in the order is all that is needed to resume a run. An epoch is cut to a multiple of
    the images of a step.

    Args:
        num_samples: Number of training images.
        seed: Random seed of the run.
        images_per_step: Number of images per optimizer step over all processes.
        parts: Sizes of the sources that were joined, in order; `ImageSource.parts`.
        weights: Relative share of every epoch for each source, in any unit. Each source is then iterated in passes of
            its own, which may end anywhere in an epoch; the first number of a key counts these passes, so every key
            is unique. Default: every image once per epoch.
        repeats: Number of times that every image follows itself, to be augmented differently; keys are then
            `(epoch, index, repeat)`, and an epoch, whose length stays the same, covers correspondingly fewer images.

    Raises:
        ValueError: If there are fewer images than one step needs, or the weights do not fit the sources.

    Source: Hoffer et al., "Augment your batch" (arXiv 1901.09335) and Berman et al., "MultiGrain" (arXiv 1902.05509)
    for the repetitions.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        seed: int,
        images_per_step: int = 1,
        parts: Sequence[int] = (),
        weights: Sequence[float] | None = None,
        repeats: int | None = None,
    ) -> None:
        if not 1 <= images_per_step <= num_samples:
            raise ValueError(
                f"There are {num_samples} training images for steps of {images_per_step}, but an epoch needs at least "
                "one full step. Lower per_device_train_batch_size or gradient_accumulation_steps, start fewer "
                "processes, or give more images with --data."
            )
        self.num_samples, self.seed, self.epoch = num_samples, seed, 0
        self.images_per_step, self.repeats = images_per_step, repeats
        self.images_per_epoch = num_samples // images_per_step * images_per_step
        self.start, self.skip = (0, 0), 0
        self.parts = tuple(parts) or (num_samples,)
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
        epochs, rest = divmod(steps - left, self.images_per_epoch // self.images_per_step)
        return epoch + 1 + epochs, rest * self.images_per_step

    def after(self, steps: int, images: int = 0) -> "EpochSampler":
        """Return the rest of an epoch in the same order, after `steps` optimizer steps and `images` of the next."""
        rest = copy.copy(self)
        epoch, offset = self.position(steps)
        rest.start_at(epoch, offset, skip=images)
        rest.set_epoch(epoch)
        return rest

    def _places(self) -> range:
        """Return the places of the current epoch's order that are left."""
        offset, skip = (self.start[1], self.skip) if self.epoch == self.start[0] else (0, 0)
        stop = offset + (self.num_samples - offset) // self.images_per_step * self.images_per_step
        return range(offset + skip, stop)

    def __len__(self) -> int:
        return len(self._places())

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        epoch, places = self.epoch, self._places()
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
        if self.draws is not None:
            passes, indices = self._weighted_draws(epoch, self.draws)
            for place in order[places.start : places.stop]:
                yield int(passes[place]), int(indices[place])
        elif self.repeats is not None:
            for place in places:
                yield epoch, int(order[place // self.repeats]), place % self.repeats
        else:
            for index in order[places.start : places.stop]:
                yield epoch, int(index)

    def _weighted_draws(self, epoch: int, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return pass and index of each image of an epoch, (num_samples,) each, source by source."""
        passes, indices = [], []
        starts = [0, *accumulate(self.parts)]
        for part, (size, images) in enumerate(zip(self.parts, draws)):
            # The epoch is a window of an endless sequence of passes over this source.
            pass_of, place = np.divmod(np.arange(epoch * images, (epoch + 1) * images), size)
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


def first_usable(
    read: Callable[[int], T], key: tuple[int, int], *, seed: int, count: int, bad_images: BadImages
) -> tuple[int, T]:
    """Return an image, or the first usable one of a sequence that (seed, epoch, index) set, with its index.

    Args:
        read: Function from an index to the image, which raises `BadImageError` if it cannot be used.
        key: Epoch and index of the image.
        seed: Random seed of the run.
        count: Number of images.
        bad_images: Recorder of the images that cannot be used.

    Raises:
        TooManyBadImagesError: If too many images cannot be used.
    """
    (epoch, index), others = key, np.random.default_rng([seed, *key, REPLACEMENTS])
    for _ in range(_REPLACEMENT_TRIES):
        try:
            found = read(index)
        except BadImageError as error:
            bad_images.bad(error, epoch=epoch, index=index)
            index = int(others.integers(count))
        else:
            bad_images.good(index)
            return index, found
    raise TooManyBadImagesError(
        f"{_REPLACEMENT_TRIES} randomly drawn images in a row cannot be used. Inspect the data with "
        "`regvit data-check`."
    )


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

    def open_shard(shard: int) -> Iterator[StreamRecord]:
        part = bisect_right(starts, shard) - 1
        return streams[part].open_shard(shard - starts[part])

    return ImageStream(" + ".join(stream.name for stream in streams), starts[-1], open_shard)


def stream_sample_id(id: str) -> int:
    """Return the number of a stream's image for all random draws: 63 bits of a hash of its id."""
    return int.from_bytes(hashlib.blake2b(id.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big") >> 1
